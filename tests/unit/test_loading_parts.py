"""One weight of an engine that comes in parts: read where it lies in a bucket, or put together in other memory."""

import torch

from rlhf_ray.rollout.buckets import TensorSpec, read_bucket
from rlhf_ray.rollout.loading import _Parts

ROWS, COLUMNS = 6, 4
WHOLE = torch.arange(float(ROWS * COLUMNS)).view(ROWS, COLUMNS)


def load_rows(weight: torch.Tensor, loaded: torch.Tensor, first: int) -> None:
    weight.data.narrow(0, first, len(loaded)).copy_(loaded)


def load_own_columns(weight: torch.Tensor, loaded: torch.Tensor) -> None:
    """As one of two workers that each hold half of the columns."""
    weight.data.copy_(loaded.narrow(1, COLUMNS, COLUMNS))


def parts_of(loader):
    weight = torch.nn.Parameter(torch.empty(ROWS, COLUMNS, device="meta"), requires_grad=False)
    weight.weight_loader = loader
    return _Parts(weight)


def bucket_of(*tensors: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Its bytes, and the tensors as a receiver reads them."""
    flat = torch.cat([one.contiguous().view(-1) for one in tensors]).view(torch.uint8)
    specs = [TensorSpec(f"{index}", one.dtype, tuple(one.shape)) for index, one in enumerate(tensors)]
    return flat, [tensor for _, tensor in read_bucket(flat, specs)]


def test_parts_that_lie_as_in_the_weight_are_read_where_they_lie():
    parts = parts_of(load_rows)
    flat, (_, first, second) = bucket_of(torch.ones(3), WHOLE[:4], WHOLE[4:])
    parts.take(second, 4)
    assert parts.missing == 4 * COLUMNS
    parts.take(first, 0)
    assert parts.missing == 0
    whole = parts.whole()
    assert torch.equal(whole, WHOLE)
    assert whole.data_ptr() == flat.data_ptr() + 3 * 4
    assert isinstance(whole, torch.nn.Parameter)


def test_parts_in_another_order_are_put_together():
    parts = parts_of(load_rows)
    flat, (second, first) = bucket_of(WHOLE[4:], WHOLE[:4])
    parts.take(first, 0)
    parts.take(second, 4)
    whole = parts.whole()
    flat.zero_()
    assert torch.equal(whole, WHOLE)


def test_a_part_outlives_the_bucket_that_it_came_in():
    parts = parts_of(load_rows)
    flat, (first,) = bucket_of(WHOLE[:4])
    parts.take(first, 0)
    parts.keep()
    flat.zero_()
    _, (second,) = bucket_of(WHOLE[4:])
    parts.take(second, 4)
    assert torch.equal(parts.whole(), WHOLE)


def test_a_slice_of_what_came_is_put_together():
    parts = parts_of(load_own_columns)
    _, (both,) = bucket_of(torch.cat([-WHOLE, WHOLE], dim=1))
    parts.take(both)
    assert parts.missing == 0
    assert torch.equal(parts.whole(), WHOLE)


def test_another_type_is_converted():
    parts = parts_of(load_rows)
    _, (whole,) = bucket_of(WHOLE.bfloat16())
    parts.take(whole, 0)
    assert torch.equal(parts.whole(), WHOLE)
