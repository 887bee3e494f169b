"""Cutting a model's parameters into buckets, the unit of a weight transfer.

Sender and receiver compute the same cut from the same metadata, so only bytes travel in a bucket.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

# Large enough that per-message cost vanishes, also that of vLLM's loaders, which go through the whole model for each;
# small enough that the first is soon there, to be loaded while the next one travels, and that the allocator keeps their
# memory (below 32 MiB, see `runtime.cluster.KEPT_MEMORY`).
BUCKET_BYTES = 31 * 2**20
# Between GPUs, where less travels in the time that vLLM takes to begin to load it. Two of these are under way at a
# time, beside what an engine has of its GPU already.
GPU_BUCKET_BYTES = 64 * 2**20

ALIGNMENT = 64  # bytes: a line of the cache


@dataclass(frozen=True)
class TensorSpec:
    """Name, wire type and full shape of one parameter."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the parameter on the wire."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_buckets(specs: Sequence[TensorSpec], bucket_bytes: int = BUCKET_BYTES) -> list[list[TensorSpec]]:
    """Cut `specs`, in order, into runs of at most `bucket_bytes`; a larger parameter travels alone.

    A layer that fits into a bucket is not cut: an engine may join its parameters, and packs them from where they lie.
    """
    buckets: list[list[TensorSpec]] = []
    room = 0
    for number, parameters in groupby(specs, lambda spec: layer_of(spec.name)):
        layer = list(parameters)
        whole = number is not None and size_of(layer) <= bucket_bytes
        parts = [layer] if whole else [[spec] for spec in layer]
        for part in parts:
            if not buckets or size_of(part) > room:
                buckets.append([])
                room = bucket_bytes
            buckets[-1] += part
            room -= size_of(part)
    return buckets


def layer_of(name: str) -> str | None:
    """The number of the layer that a parameter belongs to, None outside of layers."""
    return next((part for part in name.split(".") if part.isdigit()), None)


def size_of(bucket: Sequence[TensorSpec]) -> int:
    """Bytes of a bucket."""
    return sum(spec.num_bytes for spec in bucket)


def largest_of(buckets: Sequence[Sequence[TensorSpec]]) -> int:
    """Bytes that hold any of them, and keep one beside another aligned."""
    return -(-max(map(size_of, buckets), default=0) // ALIGNMENT) * ALIGNMENT or ALIGNMENT


def fill_buckets(
    tensors: Iterable[tuple[str, torch.Tensor]],
    buckets: Sequence[Sequence[TensorSpec]],
    room: Callable[[int], torch.Tensor],
) -> Iterator[torch.Tensor]:
    """Yield each bucket as one flat uint8 tensor, filled from `tensors` in the order of the plan.

    Args:
        tensors: as planned.
        buckets: the plan.
        room: where to put the bucket of this number: uint8, at least as long.

    Raises:
        ValueError: a tensor differs from the plan in name, type or shape; the receiver would cut it differently.
    """
    stream = iter(tensors)
    for index, bucket in enumerate(buckets):
        flat = room(index)[: size_of(bucket)]
        offset = 0
        for spec in bucket:
            name, tensor = next(stream)
            if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
                raise ValueError(
                    f"weight transfer: planned {spec}, the trainer yielded {name} {tensor.dtype} {tuple(tensor.shape)}"
                )
            target = flat[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
            target.copy_(tensor)
            offset += spec.num_bytes
        yield flat


def read_bucket(flat: torch.Tensor, bucket: Sequence[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
    """The named tensors of one received bucket, as views of its bytes."""
    pieces = flat.split([spec.num_bytes for spec in bucket])
    return [(spec.name, piece.view(spec.dtype).view(spec.shape)) for spec, piece in zip(bucket, pieces, strict=True)]
