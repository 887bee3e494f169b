"""The seed of a sample, by literal numbers: a run that continues, even years later, draws the same responses."""

from itertools import product

from rlhf_ray.rollout.pool import sampling_seed


def test_a_seed_is_that_of_the_run_the_iteration_the_prompt_and_the_sample_alone():
    # The first 48 bits of SHA-256 of "3/7/a1b2/0".
    assert sampling_seed(3, 7, "a1b2", 0) == 127552567052329


def test_each_of_them_makes_another_one():
    seeds = [sampling_seed(*parts) for parts in product((0, 1), (0, 1), ("a", "b"), (0, 1))]
    assert len(set(seeds)) == len(seeds) == 16
    assert all(0 <= seed < 2**48 for seed in seeds)
