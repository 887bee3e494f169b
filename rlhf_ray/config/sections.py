"""The sections that several stages share."""

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlhf_ray.config.problems import Problems
from rlhf_ray.errors import shortened

Dtype = Literal["fp32", "bf16"]


# Levels of lists and mappings that a value may have.
MOST_LEVELS = 20


def _texts(value: object, levels: int = MOST_LEVELS) -> Iterator[str]:
    """The texts in a value, keys included, as deep as values may be; sections have looked at their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict) and levels:
        for item in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            yield from _texts(item, levels - 1)


def is_plain(value: object, levels: int = MOST_LEVELS) -> bool:
    """Whether a value can be written as YAML and reads back as it is."""
    if not levels:
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item, levels - 1) for key, item in value.items())
    if isinstance(value, list):
        return all(is_plain(item, levels - 1) for item in value)
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, str | bool) or (isinstance(value, float) and math.isfinite(value))


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no conversion but that of int to float."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_can_be_written(self):
        """A configuration from Python can be written down and loads back to the same."""
        problems = Problems()
        for name in type(self).model_fields:
            value = getattr(self, name)
            if type(value) is int and not -(2**63) <= value < 2**63:
                problems.add(name, f"{shortened(f'{value:#x}', 20)} is no number of 64 bits; make it smaller")
            if any("\0" in text for text in _texts(value)):
                problems.add(name, "holds a NUL character, which no name or path can have; remove it")
            if any("\ud800" <= character <= "\udfff" for text in _texts(value) for character in text):
                problems.add(name, "holds an unpaired surrogate, which is no character; remove it")
        problems.check()
        return self


class RunSection(Section):
    """Where a run lives and how it is kept alive."""

    dir: str = Field(min_length=1, description="Folder that receives everything the run writes.")
    seed: int = Field(default=0, ge=0, description="Seed of every random generator of the run.")
    resume: Literal["auto", "never"] = Field(
        default="auto",
        description="Continue from the newest checkpoint in `run.dir`, or refuse a folder that holds a run.",
    )
    checkpoint_every: int = Field(
        default=0,
        ge=0,
        description="Steps (PPO: iterations) between checkpoints; 0 writes one at the end and on SIGTERM.",
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="Newest checkpoints to keep; PPO keeps the one of the best scores besides."
    )
    checkpoint_storage: str | None = Field(
        default=None,
        min_length=1,
        description="Where copies of checkpoints, metrics, ledger and samples go, for runs whose folder may be lost: "
        "`s3://...`, `gs://...` or any other URL of fsspec, a folder for this run alone.",
    )
    grace_s: float = Field(
        default=900.0,
        gt=0,
        description="Seconds from SIGTERM until the machine is gone; a step that takes longer is given up.",
    )
    timeout_s: float = Field(default=900.0, gt=0, description="Longest wait in seconds for one remote phase.")
    min_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Shortest such limit; a phase gets ten times the longest of its last durations, between the two.",
    )
    ray_address: str | None = Field(
        default=None,
        description="Address of a running Ray cluster; none takes RAY_ADDRESS or starts a local one.",
    )


class TrackingSection(Section):
    """Where metrics go besides the JSONL file that is always written."""

    wandb: Literal["off", "offline", "online"] = Field(
        default="off",
        description="Whether metrics also go to Weights & Biases, to the project WANDB_PROJECT (`rlhf_ray` where it is "
        "not set) of the team WANDB_ENTITY, and whether it uploads them.",
    )


class RowsSection(Section):
    """Which rows a stage reads and what it does with those that do not fit."""

    path: str | list[str] = Field(
        min_length=1, description="Files, folders or hub dataset names to read, in this order."
    )
    split: str = Field(default="train", min_length=1, description="Split to read of a hub dataset.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Column names that differ: ours to theirs, such as `{prompt: question}`.",
    )
    as_chat: bool = Field(
        default=False,
        description="Whether to wrap plain strings into user and assistant messages for the chat template.",
    )
    malformed: Literal["error", "skip"] = Field(
        default="error", description="What to do with a row that cannot be read: stop, or skip and count it."
    )
    overlong: Literal["error", "drop", "truncate"] = Field(
        default="drop", description="What to do with a row of more than `max_tokens` tokens."
    )
    max_tokens: int = Field(default=1024, ge=1, description="Longest sequence in tokens (PPO: longest prompt).")
    limit: int | None = Field(default=None, ge=1, description="Rows to read at most; none reads all.")


class DataSection(RowsSection):
    """Rows to train on, and others to evaluate on."""

    eval_path: str | list[str] | None = Field(
        default=None,
        min_length=1,
        description="Held-out files or hub names to evaluate on; none evaluates nothing.",
    )


class ScratchSection(Section):
    """Shape of a Llama model with random weights."""

    hidden_size: int = Field(default=256, ge=1, description="Width of the residual stream.")
    num_layers: int = Field(default=4, ge=1, description="Transformer layers.")
    num_heads: int = Field(
        default=8, ge=1, description="Query heads; `hidden_size / num_heads` must be a multiple of 32."
    )
    num_kv_heads: int = Field(default=8, ge=1, description="Key and value heads; must divide `num_heads`.")
    intermediate_size: int = Field(default=688, ge=1, description="Width of the feed-forward layers.")
    vocab_size: int = Field(
        default=4096,
        ge=261,
        description="Most tokens of the tokenizer trained on the data; at least 261 for bytes and marks.",
    )
    max_length: int = Field(default=1024, ge=2, description="Longest sequence in tokens that the model accepts.")
    tie_embeddings: bool = Field(default=True, description="Whether input and output embeddings share their weights.")

    @model_validator(mode="after")
    def _check(self):
        problems = Problems()
        head_dim = self.hidden_size / self.num_heads
        if head_dim % 32:
            problems.add(
                "hidden_size",
                f"{self.hidden_size} over `num_heads` {self.num_heads} gives heads of {head_dim:g}, and the "
                f"engine needs a multiple of 32; set it to a multiple of {32 * self.num_heads}",
            )
        if self.num_heads % self.num_kv_heads:
            problems.add(
                "num_kv_heads",
                f"{self.num_kv_heads} does not divide `num_heads` {self.num_heads}; choose a divisor of it",
            )
        problems.check()
        return self


class LoadingSection(Section):
    """How a model and its tokenizer are loaded."""

    trust_remote_code: bool = Field(default=False, description="Whether to run Python code that comes with the model.")
    chat_template: str | None = Field(
        default=None,
        description="Jinja file for a tokenizer without chat template, or `default` for the built-in one.",
    )


class PretrainedSection(LoadingSection):
    """A model that exists already."""

    path: str = Field(
        default="",
        description="Model folder or hub name; an earlier stage of a pipeline may supply it.",
    )


class ModelSection(LoadingSection):
    """A model that exists already, or one to create."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="Model folder or hub name; an earlier stage of a pipeline may supply it.",
    )
    scratch: ScratchSection | None = Field(
        default=None, description="Shape of a new model with random weights, in place of `path`."
    )

    @model_validator(mode="after")
    def _check(self):
        problems = Problems()
        if self.path is not None and self.scratch is not None:
            problems.add("scratch", f"given, and so is `path` ({self.path!r}); keep one of the two")
        problems.check()
        return self


class TrainingSection(Section):
    """How the models of a stage are optimized."""

    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="Course of the learning rate after warm-up: constant, or to zero at the last step.",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Optimizer steps over which the learning rate rises from zero."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay of the matrices.")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Global gradient norm above which gradients are scaled down."
    )
    zero_stage: int = Field(default=1, ge=0, le=3, description="DeepSpeed ZeRO stage.")
    dtype: Dtype = Field(
        default="fp32", description="Precision of forward and backward; optimizer state is always fp32."
    )
    offload_optimizer: bool = Field(default=False, description="Whether the optimizer state lives in host memory.")
    gradient_checkpointing: bool = Field(
        default=False,
        description="Whether activations are computed again in the backward pass to save memory.",
    )
    attention: Literal["auto", "flash_attention_2", "packed_sdpa"] = Field(
        default="auto",
        description="Attention of the trained models: flash attention in bf16 where a GPU and flash-attn are, or "
        "PyTorch's; `auto` takes the former where it runs.",
    )
    compile: bool = Field(
        default=False,
        description="Whether torch.compile translates the layers of models, those that score included, in first steps.",
    )
    micro_batch_tokens: int = Field(
        default=8192, ge=2, description="Most tokens of one forward and backward pass per process."
    )

    @model_validator(mode="after")
    def _check(self):
        problems = Problems()
        if self.offload_optimizer and self.zero_stage == 0:
            problems.add("offload_optimizer", "true with `zero_stage` 0, which cannot; set the latter to 1, 2 or 3")
        if self.compile and self.zero_stage == 3:
            problems.add(
                "compile",
                "true with `zero_stage` 3, which gathers weights whenever a module is called, and compiled layers call "
                "none; set the latter to 2 or less, or this to false",
            )
        if self.attention == "flash_attention_2" and self.dtype == "fp32":
            problems.add(
                "attention", "flash_attention_2 with `dtype` fp32, which it does not compute; set the latter to bf16"
            )
        problems.check()
        return self


class ProcessesSection(Section):
    """How many processes a group has and what each of them takes."""

    processes: int = Field(default=1, ge=1, description="Processes of the group.")
    cpus: float = Field(default=1.0, ge=0, description="CPU cores per process.")
    gpus: float = Field(
        default=0.0,
        ge=0,
        description="GPUs per process: 0 for CPU, 1, or a fraction to share one.",
    )

    @model_validator(mode="after")
    def _check_resources(self):
        problems = Problems()
        check_takes_something(problems, self.cpus, self.gpus)
        if self.gpus > 1:
            problems.add(
                "gpus",
                f"{self.gpus:g}, but a process drives one GPU at most; set it to 1 and `processes` to "
                f"{math.ceil(self.gpus * self.processes)}",
            )
        problems.check()
        return self


class PlacementSection(Section):
    """Which nodes the processes of a group may go to."""

    labels: dict[str, dict[str, str]] = Field(
        default_factory=dict,
        description="Ray node labels that a group's nodes must have: `{rollout: {role: rollout}}`.",
    )
    spread: list[str] = Field(
        default_factory=list, description="Groups of which every process goes to a node of its own."
    )
    share: list[list[str]] = Field(
        default_factory=list,
        description="Groups that sit together, rank by rank, and take turns on a GPU: `[[policy, rollout]]`.",
    )
    cores: dict[str, list[int]] = Field(
        default_factory=dict,
        description="Cores of its node, by number, that each process of a group is bound to: `{rollout: [0, 1]}`.",
    )
    timeout_s: float = Field(
        default=120.0, gt=0, description="Longest wait in seconds for the cluster to grant all processes."
    )
    autoscaling: bool = Field(
        default=False, description="Whether to wait for nodes that an autoscaler adds, instead of refusing at once."
    )

    def of(self, groups: tuple[str, ...]) -> "PlacementSection":
        """What of it is about these groups."""
        labels = {name: wanted for name, wanted in self.labels.items() if name in groups}
        spread = [name for name in self.spread if name in groups]
        share = [kept for together in self.share if len(kept := [name for name in together if name in groups]) > 1]
        cores = {name: numbers for name, numbers in self.cores.items() if name in groups}
        return self.model_copy(update={"labels": labels, "spread": spread, "share": share, "cores": cores})

    def partners(self, group: str) -> list[str]:
        """The groups that a group shares with."""
        return [name for together in self.share if group in together for name in together if name != group]


class RunConfig(Section):
    """What every configuration has."""

    run: RunSection = Field(description="The run.")
    tracking: TrackingSection = Field(default_factory=TrackingSection, description="Metrics.")
    placement: PlacementSection = Field(default_factory=PlacementSection, description="Where processes may go.")

    groups: ClassVar[tuple[str, ...]] = ("group",)

    @model_validator(mode="after")
    def _check_groups(self):
        problems = Problems()
        for together in self.placement.share:
            if len(together) < 2:
                found = ", ".join(together) or "nothing"
                problems.add("placement.share", f"has a set of {found} alone; name what it shares with, too")
        named = {
            "labels": self.placement.labels,
            "spread": self.placement.spread,
            "cores": self.placement.cores,
            "share": [name for together in self.placement.share for name in together],
        }
        for key, names in named.items():
            for name in names:
                if name not in self.groups:
                    problems.add(
                        f"placement.{key}", f"names {name!r}, but the groups are {', '.join(self.groups)}; name one"
                    )
        for name, cores in self.placement.cores.items():
            if not cores or min(cores) < 0:
                problems.add(
                    "placement.cores", f"{cores} for {name}; list the numbers of cores, or leave {name} out for all"
                )
        problems.check()
        return self


def check_takes_something(problems: Problems, cpus: float, gpus: float) -> None:
    """Refuses a process that takes neither CPU nor GPU, which Ray cannot place."""
    if not cpus and not gpus:
        problems.add("cpus", "0, and so is `gpus`; a process must take some of either, such as 0.1 of a core")
