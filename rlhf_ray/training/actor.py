"""One process of a trainer group: a Ray actor around `Trainer`."""

import logging
import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from rlhf_ray.errors import CheckpointError
from rlhf_ray.packing import PackedBatch
from rlhf_ray.runtime.cores import bind_to_cores
from rlhf_ray.runtime.interface import choose_interface
from rlhf_ray.runtime.ports import meeting_store
from rlhf_ray.tracking.activity import activity
from rlhf_ray.tracking.logs import setup_actor_logging
from rlhf_ray.training.trainer import Objective, Reader, Trainer, TrainerSpec

logger = logging.getLogger(__name__)


class TrainerActor:
    """Holds one rank. The group's driver side (`training/group.py`) calls every method on all ranks at once."""

    def __init__(self, spec: TrainerSpec, rank: int, world_size: int, timeout_s: float) -> None:
        setup_actor_logging()
        bind_to_cores()
        choose_interface()
        self._spec = spec
        self._rank = rank
        self._world_size = world_size
        self._timeout = timedelta(seconds=timeout_s)
        self._store: dist.TCPStore | None = None
        self._trainer: Trainer | None = None
        self._sender: Any = None
        self._writing: threading.Thread | None = None

    def listen(self) -> tuple[str, int]:
        """Rank 0: open the rendezvous on a port of the operating system's choice; returns its address."""
        host = ray.util.get_node_ip_address()
        self._store = meeting_store(host, self._timeout)
        return host, self._store.port

    def setup(self, host: str, port: int) -> None:
        """Join the process group and load the model."""
        import deepspeed

        # DeepSpeed asks for what its own launcher would set; Ray shows each actor its own GPU alone, as number 0.
        os.environ.update(LOCAL_RANK="0", RANK=str(self._rank), WORLD_SIZE=str(self._world_size))
        store = self._store or dist.TCPStore(host, port, is_master=False, timeout=self._timeout)
        if self._spec.gpu:
            torch.cuda.set_device(0)
        dist.init_process_group(
            "nccl" if self._spec.gpu else "gloo",
            store=store,
            rank=self._rank,
            world_size=self._world_size,
            timeout=self._timeout,
        )
        # On CPU DeepSpeed would compile a shared-memory collective here, under a file lock that a killed process
        # leaves behind and the next one waits for without end. gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        self._trainer = Trainer(self._spec)

    @property
    def trainer(self) -> Trainer:
        """The trainer, once `setup` ran."""
        assert self._trainer is not None
        return self._trainer

    def step(self, batches: list[PackedBatch], objective: Objective) -> dict[str, float]:
        """One optimizer step; see `Trainer.step`."""
        with activity().busy("step", **_size(batches)):
            return self.trainer.step(batches, objective)

    def forward(self, batches: list[PackedBatch], reader: Reader) -> list[list[torch.Tensor]]:
        """A forward pass; see `Trainer.forward`."""
        with activity().busy("forward", **_size(batches)):
            return self.trainer.forward(batches, reader)

    def evaluate(self, batches: list[PackedBatch], objective: Objective) -> dict[str, float]:
        """The objective's metrics; see `Trainer.evaluate`."""
        with activity().busy("evaluate", **_size(batches)):
            return self.trainer.evaluate(batches, objective)

    def save(self, folder: str) -> None:
        """Copy a checkpoint into main memory, and write it into `folder` while other methods go on.

        Raises:
            CheckpointError: the one before is not written yet.
        """
        if self._writing is not None and self._writing.is_alive():
            raise CheckpointError(f"{self._spec.name}: rank {self._rank} still writes the checkpoint before")
        with activity().busy("checkpoint"):
            self._writing = self.trainer.snapshot().write_aside(Path(folder))

    def load(self, folder: str) -> None:
        """Read a checkpoint; see `Trainer.load`."""
        self.trainer.load(folder)

    def export(self, folder: str, tokenizer: str, card: Any, extra_config: dict[str, Any]) -> None:
        """Write the weights as a transformers folder, with the tokenizer of `tokenizer`."""
        from rlhf_ray.models.loading import load_tokenizer
        from rlhf_ray.models.saving import save_model_folder

        weights = self.trainer.full_state_dict()
        if self._rank == 0:
            save_model_folder(
                folder,
                self.trainer.model.config,
                weights,
                load_tokenizer(tokenizer, trust_remote_code=self._spec.trust_remote_code),
                card,
                extra_config=extra_config,
            )
        if self._world_size > 1:
            dist.barrier()

    def free_optimizer(self) -> None:
        """Make room for others; see `Trainer.free_optimizer`."""
        with activity().busy("offload"):
            self.trainer.free_optimizer()

    def restore_optimizer(self) -> None:
        """See `Trainer.restore_optimizer`."""
        with activity().busy("offload"):
            self.trainer.restore_optimizer()

    def connect_engines(self, engines: list[Any], workers_per_engine: int, dtype: str, backend: str) -> None:
        """Join the weight-transfer group with `engines` (actor handles)."""
        from rlhf_ray.rollout.sender import WeightSender

        self._sender = WeightSender(
            self.trainer, engines, workers_per_engine, getattr(torch, dtype), backend, self._timeout.total_seconds()
        )

    def send_weights(self, version: int, batches: list[PackedBatch], reader: Reader) -> list[list[torch.Tensor]]:
        """Send all weights, which are of this version, to the connected engines; meanwhile a forward pass."""
        read: list[list[torch.Tensor]] = []
        with activity().busy("transfer"):
            self._sender.send(meanwhile=lambda: read.extend(self.forward(batches, reader)))
        activity().hold_version(version)
        return read


def _size(batches: list[PackedBatch]) -> dict[str, int]:
    """Tokens and sequences of a call."""
    return {
        "tokens": sum(len(batch.input_ids) for batch in batches if not batch.is_empty),
        "responses": sum(len(batch.indices) for batch in batches),
    }
