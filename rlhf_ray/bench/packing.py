"""`rlhf-ray bench packing`: what responses of different lengths cost a trainer, beside equal ones."""

import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from rlhf_ray.bench.reserved import reserved
from rlhf_ray.bench.rollout import spread
from rlhf_ray.bench.workload import Lengths, describe
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.driver.groups import trainer_group
from rlhf_ray.packing import Sequence
from rlhf_ray.placement.plan import demands
from rlhf_ray.runtime.supervisor import supervisor_of
from rlhf_ray.training.objectives import PolicyUpdate

GROUPS = ("policy",)
TOKEN_FIELDS = ("advantages", "old_logprobs", "ref_logprobs", "engine_logprobs")
FIRST_TOKEN = 10


def make_sequences(prompt_tokens: int, lengths: list[int]) -> list[Sequence]:
    """Prompts with responses of these lengths, as the policy's update reads them."""
    sequences = []
    for length in lengths:
        mask = torch.arange(prompt_tokens + length) >= prompt_tokens
        ids = torch.full((prompt_tokens + length,), FIRST_TOKEN)
        sequences.append(Sequence(ids, mask, dict.fromkeys(TOKEN_FIELDS, mask * 0.1), {"ptx": 0.0}))
    return sequences


def bench_packing(config: PPOConfig, prompt_tokens: int, response: Lengths, repeats: int) -> dict[str, Any]:
    """Optimizer steps of the policy on responses of drawn lengths and on as many of their mean length, in turns.

    Args:
        config: its policy is started; it logs into `<run.dir>-bench`.
        prompt_tokens: of each prompt.
        response: lengths of the `ppo.prompts_per_iteration` responses.
        repeats: steps of each that are measured, after one that warms up.

    Returns:
        Real tokens (prompts and responses) a second of both, and the ratio, with median and spread.

    Raises:
        RlhfError: the cluster is too small, or a process failed.
    """
    count = config.ppo.prompts_per_iteration
    drawn = response.draw(count, np.random.default_rng(0))
    sides = {"drawn": drawn, "equal": [round(sum(drawn) / count)] * count}
    sequences = {name: make_sequences(prompt_tokens, lengths) for name, lengths in sides.items()}
    tokens = {name: sum(map(len, of_side)) for name, of_side in sequences.items()}
    objective = PolicyUpdate(config.ppo.clip_range, config.rollout.temperature, one_step=True)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    with ExitStack() as stack:
        wanted = [demand for demand in demands(config) if demand.name in GROUPS]
        placement = stack.enter_context(reserved(config, wanted))
        supervisor = stack.enter_context(supervisor_of(config.run, placement.logs))
        policy = trainer_group(config, placement, "policy", supervisor)
        try:
            policy.start().result()
            for _ in range(repeats + 1):
                for name, of_side in sequences.items():
                    started = time.perf_counter()
                    policy.step(of_side, objective).result()
                    rates[name].append(tokens[name] / (time.perf_counter() - started))
        finally:
            policy.stop()
    shares = [one / other for one, other in zip(rates["drawn"][1:], rates["equal"][1:], strict=True)]
    return {
        "prompt_tokens": prompt_tokens,
        "response_tokens": describe(response),
        "responses": count,
        "longest": max(drawn),
        "tokens": tokens,
        "tokens_per_s": {name: spread(of_side[1:]) for name, of_side in rates.items()},
        "share_of_equal": spread(shares),
    }
