"""The driver's side of a trainer group: all ranks as one object."""

import threading
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from rlhf_ray.errors import ActorDied, Stalled
from rlhf_ray.packing import PackedBatch, Sequence, pack, partition
from rlhf_ray.placement.groups import Placement
from rlhf_ray.runtime.lifecycle import Event, State
from rlhf_ray.runtime.patience import Patience
from rlhf_ray.runtime.remote import START_TIMEOUT_S, Answer, free_name, get
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.training.actor import TrainerActor
from rlhf_ray.training.snapshot import all_written
from rlhf_ray.training.trainer import Objective, Reader, TrainerSpec

# Between two looks at what the ranks have written.
POLL_S = 0.05


class TrainerGroup:
    """Data-parallel ranks of one model. Methods that start work return at once, with an `Answer`."""

    def __init__(self, spec: TrainerSpec, placement: Placement, group: str, supervisor: Supervisor) -> None:
        self.spec = spec
        self._supervisor = supervisor
        self._patience = patience = supervisor.patience
        # A shared file system that was quick may be slow when all jobs save at once.
        self._files = Patience(patience.ceiling_s, patience.ceiling_s)
        self.token_budget = spec.section.micro_batch_tokens
        world_size = len(placement.order[group])
        actor = ray.remote(TrainerActor)
        self._actors: list[Any] = []
        for rank in range(world_size):
            options = placement.options(group, rank)
            options["name"] = free_name(options["name"])
            self._actors.append(actor.options(**options).remote(spec, rank, world_size, patience.ceiling_s))
        self._names = [f"{group}-{rank}" for rank in range(world_size)]
        for name, one in zip(self._names, self._actors, strict=True):
            supervisor.watch(name, one)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self._actors)

    def start(self) -> "PendingStart":
        """Let the ranks meet and load the model."""
        address = get(self._actors[0].listen.remote(), f"{self.spec.name} trainer: process start", START_TIMEOUT_S)
        return PendingStart(self._on_all("setup", "loading the model", *address), self._supervisor, self._names)

    def _on_all(self, method: str, what: str, *args: Any, patience: Patience | None = None) -> Answer:
        refs = [getattr(actor, method).remote(*args) for actor in self._actors]
        return Answer(refs, f"{self.spec.name} trainer: {what}", patience or self._patience)

    def _share_out(self, sequences: Items[Sequence], group: Items[int] | None) -> list[list[PackedBatch]]:
        plan = partition([len(s) for s in sequences], self.world_size, self.token_budget, group)
        return [[pack(sequences, indices) for indices in micro_batches] for micro_batches in plan]

    def _on_batches(
        self, method: str, what: str, sequences: Items[Sequence], group: Items[int] | None, *args: Any
    ) -> tuple[Answer, list[list[PackedBatch]]]:
        shares = self._share_out(sequences, group)
        refs = [getattr(actor, method).remote(share, *args) for actor, share in zip(self._actors, shares, strict=True)]
        # How long it takes follows from the tokens: a probe is no measure of a pass over all that is evaluated.
        at_most = 1 << (sum(map(len, sequences)) - 1).bit_length()
        phase = f"{self.spec.name} trainer: {what} over up to {at_most:,} tokens"
        return Answer(refs, phase, self._patience), shares

    def step(
        self, sequences: Items[Sequence], objective: Objective, group: Items[int] | None = None
    ) -> "PendingMetrics":
        """One optimizer step on `sequences`; those of equal `group` id stay in one micro-batch."""
        pending, _ = self._on_batches("step", "optimizer step", sequences, group, objective)
        return PendingMetrics(pending)

    def evaluate(
        self, sequences: Items[Sequence], objective: Objective, group: Items[int] | None = None
    ) -> "PendingMetrics":
        """The objective's metrics on `sequences`, without training."""
        pending, _ = self._on_batches("evaluate", "evaluation", sequences, group, objective)
        return PendingMetrics(pending)

    def forward(self, sequences: Items[Sequence], reader: Reader) -> "PendingForward":
        """What `reader` reads for each sequence."""
        pending, shares = self._on_batches("forward", "forward pass", sequences, None, reader)
        return PendingForward(pending, [[batch.indices for batch in share] for share in shares], len(sequences))

    def save(self, folder: str) -> "PendingSave":
        """Write a checkpoint into `folder`, which all ranks must reach."""
        copied = self._on_all("save", "copying a checkpoint", folder, patience=self._files)
        phase = f"{self.spec.name} trainer: writing a checkpoint"
        return PendingSave(copied, self._supervisor, self._names, Path(folder), phase)

    def load(self, folder: str) -> Answer:
        """Read a checkpoint."""
        return self._on_all("load", "reading a checkpoint", folder, patience=self._files)

    def export(self, folder: str, tokenizer: str, card: Any, extra_config: dict[str, Any] | None = None) -> Answer:
        """Write the weights as a transformers folder with the tokenizer of `tokenizer`."""
        arguments = (folder, tokenizer, card, extra_config or {})
        return self._on_all("export", "writing the model", *arguments, patience=self._files)

    def free_optimizer(self) -> Answer:
        """Move the optimizer's states to main memory."""
        return self._on_all("free_optimizer", "moving the optimizer to main memory")

    def restore_optimizer(self) -> Answer:
        """Move them back."""
        return self._on_all("restore_optimizer", "moving the optimizer back")

    def connect_engines(self, engines: list[Any], workers_per_engine: int, dtype: str, backend: str) -> Answer:
        """Join a weight-transfer group with rollout engines, over "gloo", "nccl" or "ipc"."""
        return self._on_all("connect_engines", "connecting to the engines", engines, workers_per_engine, dtype, backend)

    def send_weights(self, version: int, sequences: Items[Sequence], reader: Reader) -> "PendingForward":
        """Send all weights, which are of this version, to the connected engines; meanwhile read `sequences`."""
        shares = self._share_out(sequences, None)
        refs = [
            actor.send_weights.remote(version, share, reader) for actor, share in zip(self._actors, shares, strict=True)
        ]
        pending = Answer(refs, f"{self.spec.name} trainer: weight transfer", self._patience)
        return PendingForward(pending, [[batch.indices for batch in share] for share in shares], len(sequences))

    def stop(self) -> None:
        """End the actors at once."""
        for name, actor in zip(self._names, self._actors, strict=True):
            self._supervisor.retire(name)
            self._supervisor.kill(name, actor)


@dataclass
class PendingStart:
    """Ranks that load their model."""

    pending: Answer
    supervisor: Supervisor
    names: list[str]

    def result(self) -> None:
        """Wait until all have."""
        self.pending.result()
        for name in self.names:
            self.supervisor.note(name, Event.LOADED)


@dataclass
class PendingMetrics:
    """Metrics under way; equal on every rank."""

    pending: Answer

    def result(self) -> dict[str, float]:
        """Wait and return the global metrics."""
        return self.pending.result()[0]


@dataclass
class PendingSave:
    """A checkpoint under way: copied by the ranks, then written by a thread of each."""

    copied: Answer
    supervisor: Supervisor
    names: list[str]
    folder: Path
    phase: str

    def taken(self) -> None:
        """Wait for the copies: from now on the trainers may go on."""
        self.copied.result()

    def written(self, given_up: threading.Event) -> None:
        """Wait for the files, or until nobody wants them any more.

        Raises:
            CheckpointError: a rank could not write its part.
            ActorDied: a rank ended before it had.
            Stalled: the deadline passed.
        """
        started = time.monotonic()
        limit = self.copied.patience.limit(self.phase)
        while not all_written(self.folder, len(self.names)):
            if given_up.wait(POLL_S):
                return
            for name in self.names:
                if self.supervisor.state(name) is State.DEAD:
                    raise ActorDied(f"{self.phase}: {name} died before it was done")
            if time.monotonic() - started > limit:
                raise Stalled(f"{self.phase}: not all ranks wrote their parts within {limit:g} s")
        self.copied.patience.took(self.phase, time.monotonic() - started)

    def result(self) -> None:
        """Wait for all of it."""
        self.taken()
        self.written(threading.Event())


@dataclass
class PendingForward:
    """A forward pass under way."""

    pending: Answer
    indices: list[list[list[int]]]  # [rank][micro-batch] -> sequences
    num_sequences: int

    def result(self) -> list[Tensor]:
        """Wait and return one tensor a sequence, in the order in which the sequences were given."""
        outputs: list[Tensor | None] = [None] * self.num_sequences
        for of_rank, indices_of_rank in zip(self.pending.result(), self.indices, strict=True):
            for values, indices in zip(of_rank, indices_of_rank, strict=True):
                for index, value in zip(indices, values, strict=True):
                    outputs[index] = value
        return [value for value in outputs if value is not None]
