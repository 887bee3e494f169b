"""Prompts that are set aside: which ones."""

import pytest

from rlhf_ray.data.formats import Prompt
from rlhf_ray.driver.rollouts import set_aside
from rlhf_ray.errors import DataError

PROMPTS = [Prompt(uid=f"p{index}", content="", row={}, source="") for index in range(10)]


def test_some_are_set_aside_by_the_seed_and_the_others_keep_their_order():
    left, spares = set_aside(PROMPTS, 3, seed=1)
    assert left == [prompt for prompt in PROMPTS if prompt not in spares]
    assert len(spares) == len({prompt.uid for prompt in spares}) == 3
    assert set_aside(PROMPTS, 3, seed=1) == (left, spares)
    assert set_aside(PROMPTS, 3, seed=2) != (left, spares)
    assert set_aside(PROMPTS, 0, seed=1) == (PROMPTS, [])


def test_too_many_leave_nothing_to_train_on():
    with pytest.raises(DataError, match=r"`ppo\.spare_prompts` is 10, and there are 10 prompts"):
        set_aside(PROMPTS, 10, seed=1)
