"""The order of visiting items: permutations, saved positions, independence of batch size."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data.ordering import EpochOrder
from rlhf_ray.errors import CheckpointError

SIZES = st.integers(1, 60)
SEEDS = st.integers(0, 2**64 - 1)


def drawn(order, batches):
    return [item for n in batches for item in order.next(n)]


def test_order_is_the_same_in_every_version_of_this_package():
    order = EpochOrder(8, seed=7)
    assert order.next(8) == [4, 1, 6, 3, 2, 7, 5, 0]
    assert order.next(8) == [3, 1, 6, 2, 5, 4, 0, 7]


@settings(deadline=None)
@given(SIZES, SEEDS, st.integers(1, 4))
def test_every_item_comes_exactly_once_an_epoch(size, seed, epochs):
    order = EpochOrder(size, seed)
    for epoch in range(epochs):
        assert (order.epoch, order.position) == (epoch, 0)
        assert sorted(order.next(size)) == list(range(size))


@settings(deadline=None)
@given(SIZES, SEEDS, st.lists(st.integers(1, 70), min_size=1, max_size=8))
def test_order_does_not_depend_on_batch_size(size, seed, batches):
    total = sum(batches)
    one = EpochOrder(size, seed)
    other = EpochOrder(size, seed)
    assert drawn(one, batches) == drawn(other, [1] * total)
    assert (one.epoch, one.position) == divmod(total, size)


@settings(deadline=None)
@given(SIZES, SEEDS, st.integers(0, 150), st.integers(1, 70))
def test_saved_position_gives_the_same_continuation(size, seed, before, after):
    order = EpochOrder(size, seed)
    drawn(order, [1] * before)
    restored = EpochOrder(size, seed)
    restored.load_state_dict(order.state_dict())
    assert restored.state_dict() == order.state_dict()
    assert restored.next(after) == order.next(after)


def test_a_batch_may_span_two_epochs():
    order = EpochOrder(5, seed=1)
    first, rest = order.next(3), order.next(4)
    assert sorted(first + rest[:2]) == [0, 1, 2, 3, 4]
    assert (order.epoch, order.position) == (1, 2)


def test_epochs_and_seeds_differ():
    order = EpochOrder(100, seed=0)
    epochs = [tuple(order.next(100)) for _ in range(3)]
    assert len({*epochs, tuple(EpochOrder(100, seed=1).next(100))}) == 4


@pytest.mark.parametrize(("size", "seed", "name"), [(9, 3, "num_items"), (10, 4, "seed")])
def test_state_of_other_data_or_seed_is_refused(size, seed, name):
    state = EpochOrder(10, seed=3).state_dict()
    with pytest.raises(CheckpointError, match=f"has {name} {state[name]} and this run has"):
        EpochOrder(size, seed).load_state_dict(state)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="num_items must be at least 1"):
        EpochOrder(0, 0)
    with pytest.raises(ValueError, match="seed must be in"):
        EpochOrder(1, -1)
    with pytest.raises(ValueError, match="n must be at least 1"):
        EpochOrder(1, 0).next(0)


@pytest.mark.parametrize(
    ("epoch", "position"), [(0, 10), (0, -1), (-1, 0), (2**64, 0), (0, 1.0), (True, 0), (None, 0), (0, "1")]
)
def test_position_that_no_epoch_has_is_refused(epoch, position):
    """One beyond the end, that fuzzing found, was looked for without end."""
    order = EpochOrder(10, 0)
    with pytest.raises(CheckpointError, match=f"is at position {position!r} of epoch {epoch!r}, and an epoch has 10"):
        order.load_state_dict({"num_items": 10, "seed": 0, "epoch": epoch, "position": position})
