"""One rank of a data-parallel DeepSpeed trainer.

Every method is collective: all ranks call it, with the same number of micro-batches. Losses are sums divided by the
count of the whole optimizer step, taken over all ranks and micro-batches, so the gradient of a batch does not depend
on how it was split.
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_ray.algorithms.checks import noting_nonfinite
from rlhf_ray.config.sections import TrainingSection
from rlhf_ray.errors import CheckpointError
from rlhf_ray.packing import PackedBatch
from rlhf_ray.runtime.chaos import reached
from rlhf_ray.training.deepspeed_config import clips_itself, deepspeed_config, lr_multiplier
from rlhf_ray.training.offload import free_optimizer, restore_optimizer
from rlhf_ray.training.snapshot import COMMON, Snapshot, random_file
from rlhf_ray.training.state import Partition, copy_state, load_state, partition_of

logger = logging.getLogger(__name__)

# Of AdamW: the second moment forgets sooner than by its authors' 0.999, which runs of a few hundred steps hardly reach.
BETAS = (0.9, 0.95)
# Elements of each parameter that are watched for changes, about.
SAMPLED = 1024


class Objective(Protocol):
    """What a trainer minimises. Implementations are plain picklable objects; see `training/objectives.py`."""

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """What this micro-batch adds to the denominators of the optimizer step, by name."""

    def loss(self, model: nn.Module, batch: PackedBatch, totals: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the loss and of each metric: sums divided by the global `totals`."""


class Reader(Protocol):
    """What a forward pass reads off a model; see `models/reading.py`."""

    def __call__(self, model: nn.Module, batch: PackedBatch) -> list[Tensor]:
        """One tensor a sequence of the batch."""


@dataclass(frozen=True)
class TrainerSpec:
    """What a trainer is made of.

    Attributes:
        name: the group's name, for errors and logs.
        model: transformers folder or hub name to start from.
        head: "causal" (language model) or "scalar" (reward model, critic).
        total_steps: optimizer steps of the whole run, for the schedule.
        dropout: probability, for reward-model training.
        eps: AdamW's epsilon; one far above all gradients makes an update proportional to its gradient.
    """

    name: str
    model: str
    head: str
    section: TrainingSection
    learning_rate: float
    total_steps: int
    seed: int
    gpu: bool = False
    dropout: float = 0.0
    eps: float = 1e-8
    trust_remote_code: bool = False


class ParameterSample:
    """Some elements of every parameter, of this rank's part of it under ZeRO-3: shows whether an update changed any."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._last = self._take()

    def changed(self) -> bool:
        """Whether one is another than at the last call."""
        before, self._last = self._last, self._take()
        return not torch.equal(before, self._last)

    def _take(self) -> Tensor:
        parts = [getattr(p, "ds_tensor", p).detach().reshape(-1) for p in self._parameters]
        return torch.cat([part[:: max(1, len(part) // SAMPLED)] for part in parts])


class Trainer:
    """A model, its optimizer and its schedule under DeepSpeed. The process group must exist."""

    def __init__(self, spec: TrainerSpec) -> None:
        import deepspeed

        torch.manual_seed(spec.seed)
        self.spec = spec
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if spec.gpu else torch.device("cpu")
        config = deepspeed_config(spec.section, gpu=spec.gpu)
        self.model: Any = _load(spec, config)
        optimizer = torch.optim.AdamW(
            _decay_groups(self.model, spec.section.weight_decay),
            lr=spec.learning_rate,
            betas=BETAS,
            eps=spec.eps,
        )
        factor = lr_multiplier(spec.section, spec.total_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self._clipped_norm: float | None = None
        if clips_itself(spec.section):
            optimizer.register_step_pre_hook(self._clip)
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=config,
            dist_init_required=False,
        )
        self._sample = ParameterSample(self.model)
        self._unchanged = 0
        # Ranks draw different dropout masks, and the same ones again after a resume.
        torch.manual_seed(spec.seed + 1 + self.rank)

    def _clip(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = self.spec.section.max_grad_norm or math.inf
        self._clipped_norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        # DeepSpeed's own optimizers skip such a step and say so by this name, which it looks for.
        optimizer.overflow = not math.isfinite(self._clipped_norm)  # type: ignore[attr-defined]
        if not math.isfinite(self._clipped_norm):
            for parameter in parameters:
                parameter.grad = None

    def step(self, batches: list[PackedBatch], objective: Objective) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches; returns global metrics, the same on every rank.

        A step whose loss or gradient is not finite on any rank is skipped on all of them: weights, optimizer and
        schedule stay as they were.
        """
        self.engine.train()
        totals = self._sum_over_ranks([objective.counts(batch) for batch in batches])
        shares_of_batches: list[dict[str, float]] = []
        for batch in batches:
            batch = batch.to(self.device)
            with noting_nonfinite() as problems:
                loss, shares = objective.loss(self.engine, batch, totals)
            for problem in problems:
                logger.warning("optimizer step %d: %s", self.engine.global_steps, problem)
            shares["loss"] = loss.detach() * math.nan if problems else loss.detach()
            shares_of_batches.append({name: float(share) for name, share in shares.items()})
            reached("backward")
            # DeepSpeed averages gradients over ranks; the loss is already a share of the global mean.
            factor: float = self.world_size
            if len(shares_of_batches) == len(batches):
                values = self._reduce(shares_of_batches)
                if not math.isfinite(values["loss"]):
                    factor = math.nan  # a gradient that is not finite, for what skips the step on all ranks alike
            self.engine.backward(loss * factor, scale_wrt_gas=False)
        values["learning_rate"] = self.engine.get_lr()[0]
        reached("optimizer step")
        self.engine.step()
        values["grad_norm"] = self._grad_norm()
        skipped = bool(getattr(self.engine.optimizer, "overflow", False))
        values["skipped_updates"] = float(skipped)
        values["unchanged_updates"] = self._count_unchanged(expected=not skipped and values["learning_rate"] > 0)
        return values

    def _count_unchanged(self, *, expected: bool) -> float:
        """Updates in a row, up to this one, that should have changed a parameter and changed none."""
        changed = self._sum_over_ranks([{"changed": float(self._sample.changed())}])["changed"] > 0
        self._unchanged = 0 if changed else self._unchanged + expected
        return float(self._unchanged)

    def _grad_norm(self) -> float:
        # None, a float or a tensor, depending on the ZeRO stage.
        norm = self._clipped_norm if clips_itself(self.spec.section) else self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def _sum_over_ranks(self, parts: list[dict[str, float]]) -> dict[str, float]:
        """Sum by name over this rank's micro-batches, then over ranks. Every rank must know the same names."""
        names = sorted({name for part in parts for name in part})
        sums = torch.tensor([sum(part.get(name, 0.0) for part in parts) for name in names], dtype=torch.float64)
        if self.world_size > 1:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        return dict(zip(names, sums.tolist(), strict=True))

    def _reduce(self, parts: list[dict[str, float]]) -> dict[str, float]:
        """Metrics over all micro-batches of all ranks: shares are summed; names that end in /max or /min are not.

        Ranks without work know no names but `loss`, so names and values travel together, once an optimizer step.
        """
        if self.world_size > 1:
            gathered: list[Any] = [None] * self.world_size
            dist.all_gather_object(gathered, parts)
            parts = [part for of_rank in gathered for part in of_rank]
        merged: dict[str, list[float]] = {}
        for part in parts:
            for name, value in part.items():
                merged.setdefault(name, []).append(value)
        reduce = {"max": max, "min": min}
        return {name: reduce.get(name.rpartition("/")[2], math.fsum)(values) for name, values in merged.items()}

    @torch.no_grad()
    def forward(self, batches: list[PackedBatch], reader: Reader) -> list[list[Tensor]]:
        """What `reader` reads for each sequence of each micro-batch (nothing for an empty one), on the CPU."""
        self.engine.eval()
        outputs = []
        for batch in batches:
            values = reader(self.engine, batch.to(self.device))
            outputs.append([] if batch.is_empty else [value.cpu() for value in values])
        return outputs

    def evaluate(self, batches: list[PackedBatch], objective: Objective) -> dict[str, float]:
        """The objective's metrics over this rank's micro-batches and all others', without training."""
        self.engine.eval()
        totals = self._sum_over_ranks([objective.counts(batch) for batch in batches])
        parts = []
        with torch.no_grad():
            for batch in batches:
                loss, shares = objective.loss(self.engine, batch.to(self.device), totals)
                shares["loss"] = loss
                parts.append({name: float(share) for name, share in shares.items()})
        return self._reduce(parts)

    def parameters_in_full(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every parameter under its transformers name, whole, in order. Collective; one group at a time in memory.

        Args:
            dtype: floating-point parameters are converted to it; None keeps the training type.
        """
        import deepspeed

        for names, parameters in self._parameter_groups():
            partitioned = self.spec.section.zero_stage == 3
            with deepspeed.zero.GatheredParameters(parameters, enabled=partitioned):
                for name, parameter in zip(names, parameters, strict=True):
                    data = parameter.detach()
                    yield name, data.to(dtype) if dtype and data.is_floating_point() else data

    def parameter_shapes(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Names, full shapes and types of `parameters_in_full`, without gathering."""
        return [
            (name, tuple(getattr(parameter, "ds_shape", parameter.shape)), parameter.dtype)
            for names, parameters in self._parameter_groups()
            for name, parameter in zip(names, parameters, strict=True)
        ]

    def _parameter_groups(self) -> Iterator[tuple[list[str], list[nn.Parameter]]]:
        """Parameters in order, cut where the layer changes, so that gathering holds one layer at a time."""
        names: list[str] = []
        parameters: list[nn.Parameter] = []
        current: str | None = None
        for name, parameter in self.model.transformers_parameters():
            layer = next((part for part in name.split(".") if part.isdigit()), None)
            if names and layer != current:
                yield names, parameters
                names, parameters = [], []
            current = layer
            names.append(name)
            parameters.append(parameter)
        if names:
            yield names, parameters

    def full_state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All weights on the CPU of rank 0 (other ranks: empty). Collective."""
        weights = {}
        for name, tensor in self.parameters_in_full(dtype):
            if self.rank == 0:
                weights[name] = tensor.cpu().clone()
        return weights

    def free_optimizer(self) -> None:
        """Move master weights and moments to main memory, until `restore_optimizer`. Needs ZeRO 1, 2 or 3.

        Forward passes, `parameters_in_full` and `snapshot` work as before; a step does not.
        """
        if not self.spec.section.offload_optimizer:  # they are there already
            free_optimizer(self.engine, self.spec.section.zero_stage, pin=self.spec.gpu)
        if self.spec.gpu:
            torch.cuda.empty_cache()  # what the last step took, too

    def restore_optimizer(self) -> None:
        """Take back what `free_optimizer` moved."""
        if not self.spec.section.offload_optimizer:
            restore_optimizer(self.engine, self.spec.section.zero_stage)

    def snapshot(self) -> Snapshot:
        """This rank's part of a checkpoint: weights, optimizer, schedule and random state, copied into main memory."""
        tensors, metadata = copy_state(self._partition(), self.rank)
        common = None
        if self.rank == 0:
            common = {
                "parameters": self._shapes(),
                "schedule": self.engine.lr_scheduler.state_dict(),
                "steps": self.engine.global_steps,
            }
        random = {"torch": torch.get_rng_state()}
        if self.spec.gpu:
            random["cuda"] = torch.cuda.get_rng_state()
        return Snapshot(self.rank, tensors, metadata, common, random)

    def load(self, folder: str) -> None:
        """Continue from what snapshots wrote, with whatever number of ranks, ZeRO stage and precision. Collective.

        The next step is bit for bit that of the trainer that wrote it where all three are the same; otherwise it is the
        same but for the order of sums. Ranks that it did not have draw dropout masks of their own.

        Raises:
            CheckpointError: it holds another architecture, or not all of it.
        """
        common = self._read_common(Path(folder))
        load_state(self._partition(), Path(folder))
        scheduler = self.engine.lr_scheduler
        scheduler.load_state_dict(common["schedule"])
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.engine.global_steps = common["steps"]
        self._sample = ParameterSample(self.model)
        random = random_file(Path(folder), self.rank)
        if random.is_file():
            state = torch.load(random, weights_only=True)
            torch.set_rng_state(state["torch"])
            if self.spec.gpu:
                torch.cuda.set_rng_state(state["cuda"])

    def _partition(self) -> Partition:
        return partition_of(self.engine, {id(p): name for name, p in self.model.transformers_parameters()})

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(shape) for name, shape, _ in self.parameter_shapes()}

    def _read_common(self, folder: Path) -> dict[str, Any]:
        """What all ranks share; refuses a checkpoint that does not fit before any of it is taken over."""
        if not (folder / COMMON).is_file():
            raise CheckpointError(f"{self.spec.name}: no trainer state in the checkpoint {folder}")
        common = json.loads((folder / COMMON).read_text())
        there, here = common["parameters"], self._shapes()
        different = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        if different:
            name = different[0]
            raise CheckpointError(
                f"{self.spec.name}: the checkpoint {folder} does not fit {self.spec.model}: {len(different)} "
                f"parameters differ, such as {name}, of shape {there.get(name)} there and {here.get(name)} here. "
                "Resume with the model it was written for, or use another run.dir"
            )
        return common


def _load(spec: TrainerSpec, config: dict[str, Any]) -> nn.Module:
    from rlhf_ray.models.loading import load_causal_lm, load_scalar
    from rlhf_ray.models.packed import PackedCausalLM, PackedScalarModel

    if spec.section.zero_stage == 3 and spec.gpu:
        # While this object lives, from_pretrained partitions each parameter as it is read: no rank holds the whole.
        from transformers.integrations import HfDeepSpeedConfig

        partitioned_loading = HfDeepSpeedConfig(config)
    else:
        partitioned_loading = None
    # bf16 training keeps fp32 master weights, which DeepSpeed makes from the bf16 ones it trains on.
    model: PackedCausalLM | PackedScalarModel
    if spec.head == "causal":
        model = load_causal_lm(
            spec.model,
            spec.section.dtype,
            trust_remote_code=spec.trust_remote_code,
            attention=spec.section.attention,
        )
    else:
        model = load_scalar(
            spec.model,
            spec.section.dtype,
            trust_remote_code=spec.trust_remote_code,
            dropout=spec.dropout,
            seed=spec.seed,
            attention=spec.section.attention,
        )
    del partitioned_loading
    if spec.section.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if spec.section.compile:
        model.compile_layers()
    return model


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices alone: biases and norms (one dimension) are left as they are."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
