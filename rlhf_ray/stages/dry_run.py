"""What a run would do: its data, models, processes and folder, checked as far as possible without starting anything."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config import PipelineConfig, PPOConfig, RewardConfig, SFTConfig, dump_config
from rlhf_ray.config.pipeline import StageConfig
from rlhf_ray.config.schema import DataSection, LoadingSection, ModelSection, RowsSection, ScratchSection
from rlhf_ray.config.yaml_rules import dump_yaml
from rlhf_ray.data import (
    demonstration_sequences,
    ensure_chat_template,
    parse_demonstrations,
    parse_preferences,
    parse_prompts,
    preference_sequences,
    prompt_items,
    read_rows,
)
from rlhf_ray.data.formats import Content
from rlhf_ray.data.readers import FOLDER_SUFFIXES
from rlhf_ray.driver.groups import critic_model
from rlhf_ray.driver.rollouts import set_aside
from rlhf_ray.errors import ModelError, StageError
from rlhf_ray.models.loading import (
    check_same_vocabulary,
    check_tokenizer_fits,
    describe_model,
    load_config,
    load_tokenizer,
)
from rlhf_ray.names import expanded, is_hub_name, model_folder
from rlhf_ray.placement.plan import describe, make_plan, shortfalls
from rlhf_ray.rollout.offline import Sampling
from rlhf_ray.rollout.options import check_options
from rlhf_ray.scoring.actors import import_function
from rlhf_ray.stages.generate import check_causal, prepare_question
from rlhf_ray.stages.models import check_context
from rlhf_ray.stages.run import is_finished
from rlhf_ray.stages.training import OfflineConfig, paths

# Data up to this size is read and tokenised whole; of more, the first rows are.
WHOLE_BYTES = 64 * 2**20
FIRST_ROWS = 1000


@dataclass(frozen=True)
class Format:
    """How one kind of row is checked: without a tokenizer, and with one as the stage itself does it."""

    parse: Callable[..., Any]
    tokenise: Callable[..., Any]


DEMONSTRATIONS = Format(parse_demonstrations, demonstration_sequences)
PREFERENCES = Format(parse_preferences, preference_sequences)
PROMPTS = Format(parse_prompts, prompt_items)


def dry_run(config: StageConfig | PipelineConfig) -> str:
    """What a command with this configuration would do.

    Nothing is written, no actor starts and no network is used: of hub names only the name is known.

    Returns:
        The resolved configuration as YAML, and the rest as comments below it, so that the whole loads again.

    Raises:
        RlhfError: the run would fail; the message is that of the run.
    """
    lines: list[str] = []
    if isinstance(config, PipelineConfig):
        outputs: dict[str, str] = {}
        for name in config.stages:
            stage = config.stage_config(name, outputs)
            lines += ["", f"stage {name}", *_stage(stage, set(outputs.values()))]
            outputs[name] = str(model_folder(stage.run.dir))
    else:
        lines += ["", *_stage(config, set())]
    return dump_config(config) + "".join(f"# {line}".rstrip() + "\n" for line in lines)


def dry_run_generate(model: str, prompts: Sequence[Content], sampling: Sampling) -> str:
    """What `generate` with the same arguments would do, as YAML; errors are the same."""
    if is_hub_name(model):
        known: dict[str, Any] = {"model": f"{model} on the hub, fetched at the start; not looked up"}
    else:
        question = prepare_question(model, prompts, sampling)
        longest = max(map(len, question.token_ids))
        known = {"model": question.model, **question.facts, "longest_prompt": longest}
    return dump_yaml({**known, "prompts": len(prompts), **vars(sampling)})


def _stage(config: StageConfig, pending: set[str]) -> list[str]:
    """The lines of one stage; `pending` are model folders that stages before it leave."""
    state = _run_state(config)
    if is_finished(config.run.dir):
        return [state]
    if isinstance(config, PPOConfig):
        models, tokenizer = _ppo_models(config, pending)
    else:
        models, tokenizer = _trained_model(config, pending)
    plan = make_plan(config)
    machine = {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}
    return [
        state,
        "placement:",
        *_indented(describe(plan).splitlines()),
        *_indented(f"too little on this machine alone: {lack}" for lack in shortfalls(plan, machine)),
        "models:",
        *_indented(models),
        "data:",
        *_indented(_data(config, tokenizer)),
    ]


def _run_state(config: StageConfig) -> str:
    folder = Path(config.run.dir)
    if is_finished(folder):
        return f"run directory {folder}: finished already; the command would leave it as it is"
    if not (folder / "config.yaml").exists():
        return f"run directory {folder}: new"
    if config.run.resume == "never":
        raise StageError(
            f"the run directory {folder} already holds a run and `run.resume` is never; change `run.dir`, remove the "
            "directory, or set `run.resume=auto` to continue the run"
        )
    checkpoints = sorted(found.name for found in (folder / "checkpoints").glob("step_*"))
    start = f"continues from {checkpoints[-1]}" if checkpoints else "starts over, as it has no checkpoint"
    return f"run directory {folder}: holds an unfinished run, which {start}"


def _trained_model(config: OfflineConfig, pending: set[str]) -> tuple[list[str], Any]:
    """The model of SFT, reward modelling or DPO, and its tokenizer where it exists already."""
    section = config.model
    if isinstance(section, ModelSection) and section.scratch is not None:
        return [_scratch(section.scratch)], None
    path = section.path or ""  # the configuration makes sure that one of the two is given
    line, tokenizer = _model("model", path, section, pending, causal=not isinstance(config, RewardConfig))
    if tokenizer is not None:
        check_context(path, config.data.max_tokens, "data.max_tokens", section.trust_remote_code)
    return [line], tokenizer


def _ppo_models(config: PPOConfig, pending: set[str]) -> tuple[list[str], Any]:
    """Policy, critic and reward models, and the policy's tokenizer where it exists already."""
    check_options(config.rollout.vllm, gpu=config.rollout.gpus > 0)
    policy, critic = config.policy.path, critic_model(config)
    trust = LoadingSection(trust_remote_code=config.policy.trust_remote_code)
    line, tokenizer = _model("policy, reference and rollout", policy, config.policy, pending, causal=True)
    lines = [line]
    line, critic_tokenizer = _model("critic", critic, trust, pending)
    lines.append(line)
    longest = config.data.max_tokens + config.rollout.max_new_tokens
    keys = "data.max_tokens + rollout.max_new_tokens"
    for path, found in ((policy, tokenizer), (critic, critic_tokenizer)):
        if found is not None:
            check_context(path, longest, keys, trust.trust_remote_code)
    if tokenizer is not None and critic_tokenizer is not None:
        check_same_vocabulary(tokenizer, critic_tokenizer, names=(policy, critic))
    lines += [_model("reward model", item.path, trust, pending)[0] for item in config.reward.models]
    for function in config.reward.functions:
        import_function(function.path)
        lines.append(f"reward function {function.path}: found")
    return lines, tokenizer


def _model(
    role: str, path: str, section: LoadingSection, pending: set[str], *, causal: bool = False
) -> tuple[str, Any]:
    """A line about a model, and its tokenizer where the model is on this machine."""
    if path in pending and not Path(path).is_dir():
        return f"{role}: {path}, left by a stage before", None
    if is_hub_name(path):
        return f"{role}: {path} on the hub, fetched at the start; not looked up", None
    trust = section.trust_remote_code
    facts = describe_model(path, trust_remote_code=trust)
    if causal:
        check_causal(path, facts)
    tokenizer = load_tokenizer(path, trust_remote_code=trust)
    ensure_chat_template(tokenizer, section.chat_template)
    check_tokenizer_fits(load_config(path, trust_remote_code=trust), tokenizer)
    weights = [file.stat().st_size for file in Path(path).iterdir() if file.suffix in (".safetensors", ".bin")]
    if not weights:
        raise ModelError(f"The folder {path} holds no weights (*.safetensors). Give a complete model folder.")
    return (
        f"{role}: {path}, {facts['architecture']} with {facts['parameters']:,} parameters in {facts['dtype']} "
        f"({_size(sum(weights))}), context {facts['context_length']}, vocabulary {facts['vocab_size']}"
    ), tokenizer


def _scratch(shape: ScratchSection) -> str:
    """A line about a model from scratch; its parameters are those of a Llama without biases."""
    head = shape.hidden_size // shape.num_heads
    attention = 2 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.num_kv_heads * head
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    embeddings = (1 if shape.tie_embeddings else 2) * shape.vocab_size * shape.hidden_size
    parameters = embeddings + shape.num_layers * layer + shape.hidden_size
    return (
        f"model: new, {shape.num_layers} layers of width {shape.hidden_size}, about {parameters:,} parameters, context "
        f"{shape.max_length}; a tokenizer of up to {shape.vocab_size} tokens is trained on the data"
    )


def _data(config: StageConfig, tokenizer: Any) -> list[str]:
    """A line for each data set."""
    if isinstance(config, SFTConfig):
        rows = DEMONSTRATIONS
    else:
        rows = PROMPTS if isinstance(config, PPOConfig) else PREFERENCES
    data = config.data
    spares = config.ppo.spare_prompts if isinstance(config, PPOConfig) else 0
    lines = [_data_set("training", data.path, data, rows, data.max_tokens, tokenizer, spares)]
    if isinstance(data, DataSection) and data.eval_path is not None:
        lines.append(_data_set("held out", data.eval_path, data, rows, data.max_tokens, tokenizer))
    if isinstance(config, PPOConfig) and config.ppo.ptx_path is not None:
        longest = data.max_tokens + config.rollout.max_new_tokens
        plain = data.model_copy(update={"columns": {}, "limit": None})
        lines.append(_data_set("pretraining mix", config.ppo.ptx_path, plain, DEMONSTRATIONS, longest, tokenizer))
    return lines


def _data_set(
    role: str, path: str | list[str], data: RowsSection, rows: Format, max_tokens: int, tokenizer: Any, spares: int = 0
) -> str:
    """A line about one data set: where it is, its size and what would be used of it, `spares` set aside."""
    named = paths(path)
    where = ", ".join(named)
    hub = [name for name in named if is_hub_name(name)]
    if hub:
        fetched = "" if hub == named else f"; {', '.join(hub)}"
        return f"{role}: {where}{fetched} on the hub, fetched at the start; not looked up"
    size = sum(map(_bytes, named))
    limit = data.limit if size <= WHOLE_BYTES else min(FIRST_ROWS, data.limit or FIRST_ROWS)
    read = read_rows(named, split=data.split, columns=data.columns, limit=limit, on_malformed=data.malformed)
    if tokenizer is None:
        items, skipped = rows.parse(read, as_chat=data.as_chat, on_malformed=data.malformed)
        used = f"{len(read)} rows: {len(items)} used, {len(skipped) + len(read.skipped)} skipped as malformed"
    else:
        items, report = rows.tokenise(read, tokenizer, max_tokens, data.overlong, data.as_chat, data.malformed)
        used = str(report)
    if limit == data.limit:
        set_aside(items, spares, seed=0)
    return f"{role}: {where} ({_size(size)}); {'of the first ' if limit != data.limit else ''}{used}"


def _bytes(name: str) -> int:
    """Size of a data file or of the data files in a folder; 0 for what does not exist, which reading will say."""
    path = expanded(name)
    files = [path] if path.is_file() else [file for end in FOLDER_SUFFIXES for file in path.glob(f"*{end}")]
    return sum(file.stat().st_size for file in files)


def _size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
