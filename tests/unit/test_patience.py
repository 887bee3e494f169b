"""Deadlines that follow from what phases took before."""

import pytest

from rlhf_ray.runtime.patience import Patience


def after(*seconds: float, floor: float = 60.0, ceiling: float = 900.0) -> float:
    patience = Patience(floor, ceiling)
    for one in seconds:
        patience.took("step", one)
    return patience.limit("step")


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ((), 900.0),
        ((1.0, 1.0), 900.0),  # too few to say anything
        ((1.0, 1.0, 1.0), 60.0),
        ((1.0, 20.0, 1.0), 200.0),  # the longest counts
        ((200.0, 200.0, 200.0), 900.0),
        ((50.0, *[1.0] * 19), 500.0),
        ((50.0, *[7.0] * 20), 70.0),  # what is long ago does not
    ],
)
def test_the_limit_is_ten_times_the_longest_of_the_last_between_floor_and_ceiling(seconds, limit):
    assert after(*seconds) == limit


def test_a_ceiling_below_the_floor_holds():
    assert after(1.0, 1.0, 1.0, floor=60.0, ceiling=5.0) == 5.0


def test_phases_know_nothing_of_each_other():
    patience = Patience(10.0, 100.0)
    for _ in range(5):
        patience.took("step", 0.1)
    assert (patience.limit("step"), patience.limit("forward")) == (10.0, 100.0)
