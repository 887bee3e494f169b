"""Weight transfer over gloo: the engine of vLLM's weight-transfer interface for workers without a GPU.

vLLM's own backends need CUDA. This one registers as `gloo` on both sides of the same interface: the sender
(trainer rank 0) and all engine workers form one gloo group of their own, and every bucket of parameters is one
broadcast. The sender listens on a port that the operating system chose, so nothing can take it in between.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from rlhf_ray.rollout.buckets import BUCKET_BYTES, TensorSpec, fill_buckets, plan_buckets, read_bucket

BACKEND = "gloo"


@dataclass(kw_only=True)
class GlooInitInfo(WeightTransferInitInfo):
    """Where the sender listens and which rank this engine's first worker takes."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float
    bucket_bytes: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What one transfer carries: names, wire types and full shapes, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    def specs(self) -> list[TensorSpec]:
        """The same, typed."""
        return [
            TensorSpec(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(self.names, self.dtype_names, self.shapes, strict=True)
        ]


def _join_group(store: TCPStore, rank: int, info: GlooInitInfo) -> ProcessGroupGloo:
    return ProcessGroupGloo(PrefixStore("weights", store), rank, info.world_size, timedelta(seconds=info.timeout_s))


def _broadcast(group: Any, flat: torch.Tensor) -> Any:
    """Begin to send one bucket to all workers, or to receive it (torch's stubs leave gloo's collectives out)."""
    return group.broadcast(flat, 0)


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Worker side: receives buckets and loads them through vLLM's layerwise reload."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    _group: ProcessGroupGloo | None = None
    _store: TCPStore | None = None
    _bucket_bytes: int = BUCKET_BYTES

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the sender's group; the group of an earlier trainer is dropped."""
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._bucket_bytes = init_info.bucket_bytes
        self._store = TCPStore(
            init_info.master_address,
            init_info.master_port,
            is_master=False,
            timeout=timedelta(seconds=init_info.timeout_s),
        )
        self._group = _join_group(self._store, rank, init_info)

    def start_weight_update(self) -> None:
        """Open vLLM's layerwise reload; the old weights stay until each layer is complete."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Take part in one broadcast a bucket and hand the tensors to the model's own loader."""
        if self._group is None:
            raise RuntimeError("weight transfer: the trainer has not connected to this engine")
        load_weights: Any = self.model.load_weights
        for flat, bucket in self._received(plan_buckets(update_info.specs(), self._bucket_bytes)):
            load_weights(read_bucket(flat, bucket))

    def _received(self, buckets: list[list[TensorSpec]]) -> Iterator[tuple[torch.Tensor, list[TensorSpec]]]:
        """Each bucket with its bytes, while the next one is on its way."""
        arriving = None
        for bucket in buckets:
            # A fresh buffer each time: the layerwise reload keeps views until a layer is complete.
            flat = torch.empty(sum(spec.num_bytes for spec in bucket), dtype=torch.uint8)
            before, arriving = arriving, (_broadcast(self._group, flat), flat, bucket)
            if before is not None:
                before[0].wait()
                yield before[1:]
        if arriving is not None:
            arriving[0].wait()
            yield arriving[1:]

    def finish_weight_update(self) -> None:
        """Close the layerwise reload, and repack a tied output layer."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        # vLLM packs linear weights on CPU; with tied embeddings the reload leaves the packed copy behind
        # the output layer as it was, and its logits stay those of the old weights.
        head = getattr(self.model, "lm_head", None)
        method = getattr(head, "quant_method", None)
        if head is not None and method is not None and getattr(head, "weight", None) is not None:
            method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None
        self._store = None


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Sender side: the address engines reach, the group's size (sender plus all workers) and the wait limit."""

    backend: ClassVar[str] = BACKEND

    master_address: str
    world_size: int
    timeout_s: float
    bucket_bytes: int = BUCKET_BYTES


class GlooTrainerTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Trainer side: gathers on every rank, broadcasts from rank 0, drives the engines' update."""

    init_info_cls = GlooTrainerInitInfo

    _group: ProcessGroupGloo | None = None
    _store: TCPStore | None = None
    _bucket_bytes: int = BUCKET_BYTES

    @classmethod
    def trainer_init(
        cls,
        init_info: GlooTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        """Listen, let the engines join, and return the connected sender (other ranks connect nothing)."""
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine._bucket_bytes = init_info.bucket_bytes
        if not engine.is_sender:
            return engine
        engine._store = TCPStore(
            init_info.master_address,
            0,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=init_info.timeout_s),
        )
        worker_info = GlooInitInfo(
            master_address=init_info.master_address,
            master_port=engine._store.port,
            rank_offset=1,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
            bucket_bytes=init_info.bucket_bytes,
        )
        with _beside(client.init_weight_transfer_engine, asdict(worker_info)):
            engine._group = _join_group(engine._store, 0, worker_info)
        return engine

    def send_weights(self) -> None:
        """Send every parameter of the source once. All trainer ranks call it; the caller commits the version."""
        assert self.source is not None
        specs = [TensorSpec(m.name, m.dtype, m.shape) for m in self.source.metadata()]
        if not self.is_sender:
            for _ in self.source:  # takes part in the gathering of partitioned parameters
                pass
            return
        assert self._group is not None
        update = GlooUpdateInfo(
            names=[s.name for s in specs],
            dtype_names=[str(s.dtype).removeprefix("torch.") for s in specs],
            shapes=[list(s.shape) for s in specs],
        )
        self.client.start_weight_update()
        with _beside(self.client.update_weights, asdict(update)):
            sending = None
            for flat in fill_buckets(self.source, plan_buckets(specs, self._bucket_bytes)):
                if sending is not None:
                    sending.wait()
                sending = _broadcast(self._group, flat)  # while the next one is filled
            if sending is not None:
                sending.wait()
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        """Drop the group and stop listening."""
        self._group = None
        self._store = None


class _beside:
    """Run a call to the engines on a thread while the body does the trainer's half of the same exchange."""

    def __init__(self, call: Callable[[dict], None], payload: dict) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._future = self._pool.submit(call, payload)

    def __enter__(self) -> None:
        if self._future.done():  # refused at once: say so instead of waiting for peers that will not come
            self._future.result()

    def __exit__(self, kind, error, traceback) -> None:
        # After a failure the other side may still sit in the exchange: do not wait for it, its own limit ends it.
        self._pool.shutdown(wait=False)
        if error is None:
            self._future.result()


def register() -> None:
    """Make `gloo` known to vLLM's factories in this process; calling it again changes nothing."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, GlooWeightTransferEngine)
    if BACKEND not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(BACKEND, GlooTrainerTransferEngine)
