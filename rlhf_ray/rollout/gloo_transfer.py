"""The engine of vLLM's weight-transfer interface for workers without a GPU: over shared memory and gloo.

vLLM's own backends need CUDA. This one registers as `gloo` on both sides of the same interface. The sender (trainer
rank 0) shares its buckets with the workers on its own host (`shared_buckets.py`); with those on other hosts it forms a
gloo group, and every bucket is one broadcast. Either may be empty. Which worker is where, each finds out by trying. The
sender listens on a port that the operating system chose, so nothing can take it in between.
"""

import json
from collections import deque
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

from rlhf_ray.rollout.buckets import BUCKET_BYTES, TensorSpec, fill_buckets, largest_of, plan_buckets, size_of
from rlhf_ray.rollout.shared_buckets import SLOTS, Buffers, SharingSender, SharingWorker
from rlhf_ray.runtime.ports import meeting_store

BACKEND = "gloo"


@dataclass(kw_only=True)
class GlooInitInfo(WeightTransferInitInfo):
    """Where the sender listens and which rank this engine's first worker takes.

    Attributes:
        memory: name under which workers on the sender's host are handed its buckets.
    """

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float
    bucket_bytes: int
    memory: str


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


def _join_group(store: TCPStore, rank: int, members: int, timeout_s: float) -> ProcessGroupGloo:
    return ProcessGroupGloo(PrefixStore("weights", store), rank, members, timedelta(seconds=timeout_s))


def _place_of(rank: int) -> str:
    """Key under which a worker leaves whether it reached the sender's memory."""
    return f"place/{rank}"


def _broadcast(group: Any, flat: torch.Tensor) -> Any:
    """Begin to send one bucket to all workers, or to receive it (torch's stubs leave gloo's collectives out)."""
    return group.broadcast(flat, 0)


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Worker side: receives buckets and loads them."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    _group: ProcessGroupGloo | None = None  # on another host than the sender
    _shared: SharingWorker | None = None  # on the same
    _store: TCPStore | None = None
    _bucket_bytes: int = BUCKET_BYTES
    _loading: Any = None  # of the transfer under way

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the sender; the connection to an earlier one is dropped."""
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._bucket_bytes = init_info.bucket_bytes
        self._store = TCPStore(
            init_info.master_address,
            init_info.master_port,
            is_master=False,
            timeout=timedelta(seconds=init_info.timeout_s),
        )
        try:
            self._shared = SharingWorker(init_info.memory, init_info.timeout_s)
        except OSError:
            self._store.set(_place_of(rank), "elsewhere")
            others = json.loads(self._store.get("elsewhere"))
            self._group = _join_group(self._store, 1 + others.index(rank), 1 + len(others), init_info.timeout_s)
        else:
            self._store.set(_place_of(rank), "here")
            self._shared.open()

    def start_weight_update(self) -> None:
        """Open the model for new weights."""
        from rlhf_ray.rollout.loading import begin_loading

        if self._loading is not None:
            self._loading.abandon()
        self._loading = begin_loading(self.model, self.model_config)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Load every bucket as it comes."""
        buckets = plan_buckets(update_info.specs(), self._bucket_bytes)
        if self._shared is not None:
            for memory, bucket in zip(self._shared.buckets(len(buckets)), buckets, strict=True):
                self._loading.load(memory[: size_of(bucket)], bucket)
        elif self._group is not None:
            for flat, bucket in self._received(buckets):
                self._loading.load(flat, bucket)
        else:
            raise RuntimeError("weight transfer: the trainer has not connected to this engine")

    def _received(self, buckets: list[list[TensorSpec]]) -> Iterator[tuple[torch.Tensor, list[TensorSpec]]]:
        """Each bucket with its bytes, while the next one is on its way."""
        buffers = Buffers.private(largest_of(buckets))
        arriving = None
        for index, bucket in enumerate(buckets):
            flat = buffers.of(index)[: size_of(bucket)]
            before, arriving = arriving, (_broadcast(self._group, flat), flat, bucket)
            if before is not None:
                before[0].wait()
                yield before[1:]
        if arriving is not None:
            arriving[0].wait()
            yield arriving[1:]

    def finish_weight_update(self) -> None:
        """Close the model again."""
        self._loading.finish()
        self._loading = None

    def shutdown(self) -> None:
        """Leave the sender."""
        if self._shared is not None:
            self._shared.close()
        self._shared = None
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
    """Trainer side: gathers on every rank, sends from rank 0, drives the engines' update."""

    init_info_cls = GlooTrainerInitInfo

    _group: ProcessGroupGloo | None = None  # with workers on other hosts
    _shared: SharingSender | None = None
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
        shared = SharingSender(largest_of(plan_buckets(engine._specs(), init_info.bucket_bytes)), init_info.timeout_s)
        store = meeting_store(init_info.master_address, timedelta(seconds=init_info.timeout_s))
        worker_info = GlooInitInfo(
            master_address=init_info.master_address,
            master_port=store.port,
            rank_offset=1,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
            bucket_bytes=init_info.bucket_bytes,
            memory=shared.name,
        )
        with _beside(client.init_weight_transfer_engine, asdict(worker_info)):
            ranks = range(1, init_info.world_size)
            elsewhere = [rank for rank in ranks if store.get(_place_of(rank)) == b"elsewhere"]
            shared.admit(len(ranks) - len(elsewhere))
            store.set("elsewhere", json.dumps(elsewhere))
            if elsewhere:
                engine._group = _join_group(store, 0, 1 + len(elsewhere), init_info.timeout_s)
        engine._store, engine._shared = store, shared
        return engine

    def _specs(self) -> list[TensorSpec]:
        assert self.source is not None
        return [TensorSpec(m.name, m.dtype, m.shape) for m in self.source.metadata()]

    def send_weights(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Send every parameter of the source once. All trainer ranks call it; the caller commits the version.

        Where it fails the connections are in the middle of something, and end.

        Args:
            meanwhile: done on every rank while the engines load what was sent last.
        """
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:  # takes part in the gathering of partitioned parameters
                pass
            meanwhile()
            return
        try:
            self._send(self._specs(), meanwhile)
        except BaseException:
            self.shutdown()
            raise

    def _send(self, specs: list[TensorSpec], meanwhile: Callable[[], None]) -> None:
        assert self.source is not None
        if self._shared is None:
            raise RuntimeError("weight transfer: not connected to the engines")
        update = GlooUpdateInfo(
            names=[s.name for s in specs],
            dtype_names=[str(s.dtype).removeprefix("torch.") for s in specs],
            shapes=[list(s.shape) for s in specs],
        )
        # The first buckets are filled while the engines stop.
        with _beside(self._update_engines, asdict(update)):
            outgoing = _Outgoing(self._shared, self._group)
            for flat in fill_buckets(self.source, plan_buckets(specs, self._bucket_bytes), outgoing.room):
                outgoing.send(flat)
            meanwhile()
            outgoing.wait()

    def _update_engines(self, update: dict[str, Any]) -> None:
        shared = self._shared
        try:
            self.client.start_weight_update()
            self.client.update_weights(update)
            self.client.finish_weight_update()
        except BaseException:
            if shared is not None:
                shared.interrupt()  # the sender waits for workers that read nothing
            raise

    def shutdown(self) -> None:
        """Drop the connections and stop listening."""
        if self._shared is not None:
            self._shared.close()
        self._shared = None
        self._group = None
        self._store = None


class _Outgoing:
    """The buckets of one transfer that are on their way to the workers, at most `SLOTS` at a time."""

    def __init__(self, shared: SharingSender, group: ProcessGroupGloo | None) -> None:
        self._shared, self._group = shared, group
        self._under_way: deque[Any] = deque()

    def room(self, index: int) -> torch.Tensor:
        """The memory of the next bucket, once nobody reads what was there."""
        if len(self._under_way) == SLOTS:
            self._wait_for_oldest()
        return self._shared.buffers.of(index)

    def send(self, flat: torch.Tensor) -> None:
        self._shared.offer()
        self._under_way.append(_broadcast(self._group, flat) if self._group is not None else None)

    def wait(self) -> None:
        """Until all have arrived."""
        while self._under_way:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        sending = self._under_way.popleft()
        if sending is not None:
            sending.wait()
        self._shared.wait_until_read()


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
