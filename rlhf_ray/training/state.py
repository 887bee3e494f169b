"""The optimizer's state on disk: readable by another number of ranks and at another ZeRO stage.

DeepSpeed keeps fp32 master weights and Adam's moments in flat tensors, each rank its part, cut anew for every number of
ranks and every stage. A rank's flat tensors go as they are into a safetensors file of its own (`snapshot.py`), with a
table of the runs of parameter elements in them. A rank that reads looks its own runs up in all tables, and takes of
each file the bytes it needs alone.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rlhf_ray.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
PATTERN = "state_*.safetensors"


@dataclass(frozen=True)
class Fragment:
    """A run of elements of a flattened parameter, from `start`, which lies in flat tensor `flat`, from `offset`."""

    name: str
    flat: int
    offset: int
    start: int
    length: int


@dataclass(frozen=True)
class Partition:
    """What one rank keeps of the optimizer's state.

    Attributes:
        flats: fp32 master weights, the tensors that the optimizer steps.
        fragments: whose elements they are; what none of them covers is padding.
        refresh: makes the model's weights those of the master weights, on all ranks. Collective.
        replicated: every rank keeps the same.
    """

    optimizer: torch.optim.Optimizer
    flats: list[Tensor]
    fragments: list[Fragment]
    refresh: Callable[[], None]
    replicated: bool


def partition_of(engine: Any, names: dict[int, str]) -> Partition:
    """This rank's part of a DeepSpeed engine's optimizer state.

    Args:
        names: of the model's parameters, by `id`.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _zero_3(optimizer, names)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return _zero_1_and_2(optimizer, names)
    return _no_zero(optimizer, names)


def _no_zero(optimizer: Any, names: dict[int, str]) -> Partition:
    """Plain AdamW, or, in bf16, DeepSpeed's wrapper with a master tensor a parameter."""
    base = getattr(optimizer, "optimizer", optimizer)
    masters = [p for group in base.param_groups for p in group["params"]]
    parameters = [p for group in optimizer.fp16_groups for p in group] if base is not optimizer else masters
    fragments = [Fragment(names[id(p)], i, 0, 0, p.numel()) for i, p in enumerate(parameters)]

    def refresh() -> None:
        for parameter, master in zip(parameters, masters, strict=True):
            if parameter is not master:
                parameter.data.copy_(master.data)

    return Partition(base, masters, fragments, refresh, replicated=True)


def _zero_1_and_2(optimizer: Any, names: dict[int, str]) -> Partition:
    flats = optimizer.single_partition_of_fp32_groups
    fragments = []
    for i, group in enumerate(optimizer.bit16_groups):
        for parameter in group:
            mapping = parameter._hp_mapping  # None where all of it lies on other ranks
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                fragments.append(Fragment(names[id(parameter)], i, here.start, there.start, here.numel))
    return Partition(optimizer.optimizer, flats, fragments, optimizer.update_lp_params, replicated=False)


def _zero_3(optimizer: Any, names: dict[int, str]) -> Partition:
    flats = optimizer.fp32_partitioned_groups_flat
    rank = torch.distributed.get_rank(group=optimizer.dp_process_group)
    fragments = []
    for i, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in group:
            share = parameter.partition_numel()  # the last ranks' shares may end in padding
            start = rank * share
            length = min(share, parameter.ds_numel - start)
            if length > 0:
                fragments.append(Fragment(names[id(parameter)], i, offset, start, length))
            offset += share

    def refresh() -> None:
        optimizer.checkpoint_event_prologue()  # small parameters are kept whole between steps
        for i in range(len(flats)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer.checkpoint_event_epilogue()

    return Partition(optimizer.optimizer, flats, fragments, refresh, replicated=False)


def copy_state(partition: Partition, rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """This rank's part, copied into main memory: the tensors of its file, and the file's metadata.

    Before the first step there are no moments. Of what every rank keeps, rank 0 alone has tensors here.
    """
    tensors: dict[str, Tensor] = {}
    steps = set()
    if partition.replicated and rank > 0:
        return {}, {}
    for i, flat in enumerate(partition.flats):
        tensors[f"master.{i}"] = _copy(flat.detach())
        state = partition.optimizer.state.get(flat)
        steps.add(int(state["step"]) if state else 0)
        if state:
            tensors |= {f"{moment}.{i}": _copy(state[moment]) for moment in MOMENTS}
    table = [astuple(fragment) for fragment in partition.fragments]
    return tensors, {"fragments": json.dumps(table), "steps": json.dumps(sorted(steps))}


def _copy(tensor: Tensor) -> Tensor:
    # A copy on the CPU as well: the optimizer goes on changing the original.
    return tensor.view(-1).to("cpu", copy=True)


def load_state(partition: Partition, folder: Path) -> None:
    """Take this rank's part from what any number of ranks has written. Collective.

    Raises:
        CheckpointError: an element of a parameter is in none of the files.
    """
    with ExitStack() as stack:
        saved = SavedState(folder, stack)
        for i, flat in enumerate(partition.flats):
            targets = {"master": flat.data.view(-1)}
            if saved.step:
                state = partition.optimizer.state[flat]
                state["step"] = torch.tensor(float(saved.step))
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(flat.data)
                    targets[moment] = state[moment].view(-1)
            for fragment in partition.fragments:
                if fragment.flat == i:
                    for part, target in targets.items():
                        saved.read(part, fragment, target)
    partition.refresh()


class SavedState:
    """The files of a checkpoint, and which of them holds what.

    Attributes:
        step: optimizer steps taken when they were written.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._places: dict[str, list[tuple[Any, Fragment]]] = {}
        steps: set[int] = set()
        for path in sorted(folder.glob(PATTERN)):
            file = stack.enter_context(safe_open(path, "pt"))
            metadata = file.metadata()
            steps.update(json.loads(metadata["steps"]))
            for fragment in (Fragment(*row) for row in json.loads(metadata["fragments"])):
                self._places.setdefault(fragment.name, []).append((file, fragment))
        if len(steps) != 1:
            raise CheckpointError(f"the trainer states in {folder} are of different steps: {sorted(steps)}")
        (self.step,) = steps

    def read(self, part: str, wanted: Fragment, target: Tensor) -> None:
        """Fill the fragment's place in `target`, a flat tensor, with `part` of it: "master" or one of the moments."""
        missing = wanted.length
        for file, found in self._places.get(wanted.name, []):
            first, end = _overlap(wanted, found)
            if first < end:
                source = file.get_slice(f"{part}.{found.flat}")
                at = found.offset + first - found.start
                values = source[at : at + end - first]
                target.narrow(0, wanted.offset + first - wanted.start, end - first).copy_(values)
                missing -= end - first
        if missing:
            raise CheckpointError(
                f"{missing} elements of {wanted.name} are in no file of the checkpoint {self._folder}; "
                "remove it, so that the run continues from the one before"
            )


def _overlap(one: Fragment, other: Fragment) -> tuple[int, int]:
    return max(one.start, other.start), min(one.start + one.length, other.start + other.length)
