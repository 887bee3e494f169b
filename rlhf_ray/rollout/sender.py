"""The trainer's end of a weight transfer: a source over DeepSpeed's parameters, and the calls to the engines."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import ray
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, WeightTransferUpdatePayload
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rlhf_ray.rollout import gloo_transfer
from rlhf_ray.rollout.buckets import GPU_BUCKET_BYTES
from rlhf_ray.runtime.ports import held_port
from rlhf_ray.runtime.remote import get
from rlhf_ray.training.trainer import Trainer


class TrainerSource(WeightSource):
    """vLLM's `WeightSource` over a DeepSpeed trainer: whole parameters, partitioned ones gathered layer by layer."""

    def __init__(self, trainer: Trainer, dtype: torch.dtype) -> None:
        self._trainer = trainer
        self._dtype = dtype

    def metadata(self) -> list[ParamMeta]:
        """Names, wire types and full shapes, without gathering."""
        return [
            ParamMeta(name, self._dtype if dtype.is_floating_point else dtype, shape)
            for name, shape, dtype in self._trainer.parameter_shapes()
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._trainer.parameters_in_full(self._dtype)


class EngineClient:
    """vLLM's weight-sync client over Ray actors: each call goes to every engine and waits with a deadline."""

    def __init__(self, engines: list[Any], workers_per_engine: int, timeout_s: float) -> None:
        self._engines = engines
        self._workers_per_engine = workers_per_engine
        self._timeout_s = timeout_s

    def _wait(self, refs: list[Any], what: str) -> None:
        get(refs, f"weight transfer: {what}", self._timeout_s)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every engine joins, its workers at ranks of their own."""
        refs = []
        for index, engine in enumerate(self._engines):
            own = dict(init_info)
            if "rank_offset" in own:  # CUDA IPC has no group
                own["rank_offset"] += index * self._workers_per_engine
            refs.append(engine.init_weight_transfer_engine.remote(own))
        self._wait(refs, "engines joining the trainer's group")

    def start_weight_update(self) -> None:
        """All engines stop serving."""
        self._wait([engine.start_weight_update.remote() for engine in self._engines], "engines pausing")

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        """All engines receive."""
        self._wait([engine.update_weights.remote(update_info) for engine in self._engines], "engines receiving")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All engines close the update; versions are committed by the pool, after its probe."""
        self._wait([engine.finish_weight_update.remote() for engine in self._engines], "engines closing the update")


class WeightSender:
    """Connected to the engines; `send` is collective over the trainer's ranks."""

    def __init__(
        self,
        trainer: Trainer,
        engines: list[Any],
        workers_per_engine: int,
        dtype: torch.dtype,
        backend: str,
        timeout_s: float,
    ) -> None:
        gloo_transfer.register()
        world_size = 1 + len(engines) * workers_per_engine
        host = ray.util.get_node_ip_address()
        source = TrainerSource(trainer, dtype)
        self._gpu = trainer.spec.gpu
        self._frees_buffer = backend == "ipc"  # the engine beside it wants the memory for its cache
        info: Any
        with ExitStack() as stack:
            if backend == "ipc":
                # NCCL refuses two processes on one GPU. Each rank hands its own buffer to the engine beside it.
                largest = max(math.prod(meta.shape) * meta.dtype.itemsize for meta in source.metadata())
                size = max(GPU_BUCKET_BYTES, largest)  # no parameter may be larger than the buffer
                info = IPCTrainerInitInfo(rank=trainer.rank, packed=True, packed_buffer_size_bytes=size)
            elif backend == "nccl":
                port = stack.enter_context(held_port(host))
                info = NCCLTrainerInitInfo(
                    host,
                    port,
                    world_size,
                    packed=True,
                    packed_buffer_size_bytes=GPU_BUCKET_BYTES,
                    rank=trainer.rank,
                )
            else:
                info = gloo_transfer.GlooTrainerInitInfo(host, world_size, timeout_s, rank=trainer.rank)
            self._engine = WeightTransferTrainerFactory.trainer_init(
                info,
                client=EngineClient(engines, workers_per_engine, timeout_s),
                source=source,
            )

    def send(self, meanwhile: Callable[[], None]) -> None:
        """Send every parameter to every engine, and do something else while those on CPUs load the last ones."""
        if self._gpu:
            # vLLM fills buckets on streams of its own, which do not wait for the last optimizer step.
            torch.cuda.synchronize()
        if isinstance(self._engine, gloo_transfer.GlooTrainerTransferEngine):
            self._engine.send_weights(meanwhile)
        else:
            self._engine.send_weights()
            meanwhile()
        if self._frees_buffer:
            torch.cuda.empty_cache()
