"""Cutting parameters into the buckets of a weight transfer, and putting them together again."""

import pytest
import torch

from rlhf_ray.rollout.buckets import TensorSpec, fill_buckets, largest_of, plan_buckets, read_bucket, size_of


def spec(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def room(_: int) -> torch.Tensor:
    return torch.empty(4096, dtype=torch.uint8)


def test_bytes_on_the_wire_follow_shape_and_type():
    assert spec("a", 3, 5).num_bytes == 60
    assert spec("a", 3, 5, dtype=torch.bfloat16).num_bytes == 30
    assert spec("scalar").num_bytes == 4


def test_a_bucket_is_filled_up_to_its_last_byte_and_no_further():
    specs = [spec("a", 4), spec("b", 6), spec("c", 1)]  # 16, 24 and 4 bytes
    assert plan_buckets(specs, 40) == [[specs[0], specs[1]], [specs[2]]]
    assert plan_buckets(specs, 39) == [[specs[0]], [specs[1], specs[2]]]
    assert plan_buckets(specs, 44) == [specs]


def test_a_parameter_larger_than_a_bucket_travels_alone():
    specs = [spec("a", 1), spec("large", 100), spec("b", 1), spec("c", 1)]
    assert plan_buckets(specs, 16) == [[specs[0]], [specs[1]], [specs[2], specs[3]]]


def test_a_layer_is_cut_only_where_it_is_larger_than_a_bucket():
    specs = [
        spec("embed", 1),
        spec("layers.0.q", 2),
        spec("layers.0.k", 1),
        spec("layers.1.q", 4),
        spec("layers.1.k", 2),
    ]
    assert plan_buckets(specs, 12) == [[specs[0]], specs[1:3], [specs[3]], [specs[4]]]
    assert plan_buckets(specs, 24) == [specs[:3], specs[3:]]


def test_no_parameters_make_no_buckets():
    assert plan_buckets([], 16) == []
    assert list(fill_buckets([], [], room)) == []


def test_the_largest_bucket_says_how_much_memory_holds_any_of_them_side_by_side():
    plan = plan_buckets([spec("a", 1), spec("large", 100), spec("b", 16)], 16)
    assert list(map(size_of, plan)) == [4, 400, 64]
    assert largest_of(plan) == 448  # whole lines of 64 bytes
    assert largest_of(plan[2:]) == 64


@pytest.mark.parametrize("bucket_bytes", [1, 24, 64, 10**6])
def test_every_tensor_arrives_bit_for_bit_and_in_order_whatever_the_size(bucket_bytes: int):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        (name, torch.randn(shape, generator=generator).to(dtype))
        for name, shape, dtype in [
            ("embedding", (7, 3), torch.float32),
            ("norm", (3,), torch.float32),
            ("scale", (), torch.float32),
            ("half", (2, 2, 2), torch.bfloat16),
            ("last", (5,), torch.float32),
        ]
    ]
    tensors.append(("counts", torch.arange(4)))
    plan = plan_buckets([TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors], bucket_bytes)
    received = [
        pair
        for flat, bucket in zip(fill_buckets(tensors, plan, room), plan, strict=True)
        for pair in read_bucket(flat, bucket)
    ]
    assert [name for name, _ in received] == [name for name, _ in tensors]
    for (_, sent), (_, got) in zip(tensors, received, strict=True):
        assert got.dtype == sent.dtype
        assert torch.equal(got, sent)


def test_a_non_contiguous_tensor_arrives_as_it_looks():
    tensor = torch.arange(6.0).view(2, 3).T
    plan = plan_buckets([spec("t", 3, 2)])
    (flat,) = fill_buckets([("t", tensor)], plan, room)
    assert read_bucket(flat, plan[0])[0][1].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("b", torch.zeros(4)), ("a", torch.zeros(4, dtype=torch.bfloat16)), ("a", torch.zeros(2, 2))],
    ids=["name", "type", "shape"],
)
def test_a_tensor_that_is_not_the_planned_one_is_refused(name: str, tensor: torch.Tensor):
    plan = plan_buckets([spec("a", 4)])
    with pytest.raises(ValueError, match=r"planned .*name='a'.*the trainer yielded"):
        list(fill_buckets([(name, tensor)], plan, room))
