"""`rlhf-ray bench iteration`: how long an iteration of PPO takes and where its time goes, beside the bare work.

The bare work is what the same cores need without this system: vLLM alone for the responses, plain torch for a forward
pass of the reference, of the reward model and of the critic, and for an optimizer step of policy and critic, one after
the other, each on all cores. A run that samples ahead of training is measured beside its own parts in turns.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_ray.bench.bare_work import bare_work
from rlhf_ray.bench.cells import as_values, engine_cells, run_cells
from rlhf_ray.bench.random_models import SMALL_LLAMA, write_llama
from rlhf_ray.bench.rollout import spread
from rlhf_ray.bench.workload import Fixed, Lengths, LogNormal, Workload, make_workload
from rlhf_ray.config.load import changed, from_dict
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.data.formats import Prompt
from rlhf_ray.driver.groups import running_groups
from rlhf_ray.driver.ppo import PPOLoop
from rlhf_ray.driver.rollouts import Rollouts
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.placement.cells import Cell
from rlhf_ray.placement.plan import make_plan
from rlhf_ray.placement.speeds import Samples
from rlhf_ray.rollout.engine import SampleRequest
from rlhf_ray.runtime.cluster import own_cluster
from rlhf_ray.stages.run import open_run
from rlhf_ray.tracking.timeline import Timeline, cut, iterations, nobody_busy, read_timeline

logger = logging.getLogger(__name__)

SCORING = ("log-probabilities", "scores", "forward")
# The last is what the loop waited for the checkpoint before the iteration.
PARTS = ("generate", "score", "advantages", "train", "transfer", "checkpoint")


@dataclass(frozen=True)
class IterationWorkload:
    """What an iteration works on.

    Attributes:
        model: keys of `LlamaConfig`, for all four models.
        prompts: of an iteration, one response each.
        prompt_tokens: tokens of each.
        response: their lengths.
    """

    model: dict[str, Any]
    prompts: int
    prompt_tokens: int
    response: Lengths

    def requests(self, seed: int) -> Workload:
        """Those of one iteration."""
        prompt = Fixed(self.prompt_tokens)
        return make_workload(prompt, self.response, self.prompts, 1, self.model["vocab_size"], seed)


# 100 million parameters.
LARGE_LLAMA = SMALL_LLAMA | {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
}
WORKLOADS = {
    "w1": IterationWorkload(SMALL_LLAMA, 64, 32, Fixed(128)),
    "w2": IterationWorkload(SMALL_LLAMA, 64, 32, LogNormal(48, 0.9, 384)),
    "w3": IterationWorkload(LARGE_LLAMA, 16, 32, Fixed(128)),
}


class KnownLengths(Rollouts):
    """Responses of lengths that are known beforehand."""

    lengths: list[int]

    def requests(self, iteration: int, prompts: list[Prompt]) -> tuple[list[SampleRequest], dict[str, Prompt]]:
        """What to sample, each as long as it is to be."""
        requests, by_uid = super().requests(iteration, prompts)
        pairs = zip(requests, self.lengths, strict=True)
        return [replace(request, max_new_tokens=length) for request, length in pairs], by_uid


def built_in_config(
    workload: IterationWorkload, dtype: str, folder: Path, count: int, overrides: list[str]
) -> PPOConfig:
    """A run of `count` iterations on this machine's cores, on models that are written into the folder."""
    write_models(folder, workload.model)
    return config_on_models(workload, dtype, folder, count, overrides)


def write_models(folder: Path, sizes: dict[str, Any]) -> None:
    """The policy, and the reward model that the critic starts from, into the folder."""
    write_llama(folder / "policy", sizes, scalar=False)
    write_llama(folder / "reward", sizes, scalar=True)


def config_on_models(
    workload: IterationWorkload, dtype: str, folder: Path, count: int, overrides: list[str]
) -> PPOConfig:
    """The configuration alone; the models of `write_models` are in the folder, or will be."""
    cores = len(os.sched_getaffinity(0))
    policy, reward = str(folder / "policy"), str(folder / "reward")
    half = max(1, cores // 2)
    values = {
        "run": {"dir": str(folder / "run"), "checkpoint_every": count},
        "data": {"path": "none", "max_tokens": workload.prompt_tokens},
        "policy": {"path": policy, "cpus": half},
        "critic": {"init": reward, "cpus": half},
        "reference": {"dtype": dtype},
        "reward": {"models": [{"path": reward}]},
        "rollout": {
            "cpus": cores,
            "dtype": dtype,
            "kv_cache_gib": 1.0,
            "max_concurrency": workload.prompts,
            "max_new_tokens": workload.response.largest,
        },
        # Tensors of more tokens are above what glibc keeps (`runtime.cluster`), and no faster.
        "training": {"dtype": dtype, "zero_stage": 0, "micro_batch_tokens": 2048},
        "ppo": {"iterations": count, "prompts_per_iteration": workload.prompts, "kl_coef": 0.05},
    }
    config = from_dict(values, "ppo", overrides, "the built-in configuration")
    assert isinstance(config, PPOConfig)
    return config


@contextmanager
def this_machine(config: PPOConfig) -> Iterator[None]:
    """Be connected to a cluster of this machine's cores.

    Groups that work one after the other use the same cores, so that Ray is told of more than there are.
    """
    with own_cluster(int(make_plan(config).needed("CPU")) + 1):
        yield


def bench_iteration(config: PPOConfig, workload: IterationWorkload) -> dict[str, Any]:
    """Measure the iterations of a run beside what they are made of.

    With `ppo.max_staleness` 0 that is the bare work, measured before each iteration, so that both see the same machine,
    or after all of them on GPUs.
    Above 0 it is the longer of sampling and of all the rest, in the same iterations without staleness, measured before.

    Args:
        config: of `built_in_config`.
        workload: the same.

    Returns:
        Seconds an iteration and of its parts, and shares; each with median and spread.

    Raises:
        RlhfError: a model, the cluster or a process failed.
    """
    requests = workload.requests(seed=0)
    if not config.ppo.max_staleness:
        if config.rollout.gpus:  # which have no room for both at a time
            rows, cells = run_system(config, requests)
            with bare_work(config, requests, workload.prompt_tokens) as bare:
                for _ in range(config.ppo.iterations):
                    bare.measure()
        else:
            with bare_work(config, requests, workload.prompt_tokens) as bare:
                rows, cells = run_system(config, requests, bare.measure)
        parts = {name: seconds[1:] for name, seconds in bare.seconds.items()}
        total = [sum(of_turn) for of_turn in zip(*parts.values(), strict=True)]
        return {
            **_summary(rows),
            "bare_s": spread(total),
            "bare_parts_s": {name: spread(seconds) for name, seconds in parts.items()},
            "share_of_bare": spread([row["iteration"] / one for row, one in zip(rows, total, strict=True)]),
            "cells": as_values(cells),
        }
    before = changed(config, ["ppo.max_staleness=0", f"run.dir={config.run.dir}-in-turns"])
    assert isinstance(before, PPOConfig)
    in_turns, cells = run_system(before, requests)
    generate = float(np.median([row["generate"] for row in in_turns]))
    rest = float(np.median([row["iteration"] - row["generate"] for row in in_turns]))
    rows = run_system(config, requests)[0][config.ppo.max_staleness :]  # until sampling is as far ahead as it may be
    return {
        **_summary(rows),
        "in_turns_s": {"iteration": spread([row["iteration"] for row in in_turns]), "generate": generate, "rest": rest},
        "share_of_longer": spread([row["iteration"] / max(generate, rest) for row in rows]),
        "cells": as_values(cells),
    }


def _summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "iteration_s": spread([row["iteration"] for row in rows]),
        "parts_s": {name: spread([row[name] for row in rows]) for name in PARTS},
        "nobody_busy": spread([row["nobody_busy"] for row in rows]),
        "scoring_hidden": spread([row["scoring_hidden"] for row in rows]),
        "checkpoint_share": spread([row["checkpoint"] / row["iteration"] for row in rows]),
    }


class MeasuredLoop(PPOLoop):
    """A loop that does something before each iteration."""

    before: Callable[[], None] | None = None

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration, which does not count what comes before."""
        if self.before is not None:
            self.before()
        return super().iterate(iteration)


def run_system(
    config: PPOConfig, requests: Workload, before: Callable[[], None] | None = None
) -> tuple[list[dict[str, float]], list[Cell]]:
    """Every iteration but the first: its seconds, those of its parts, and shares of them; and the speeds of the run.

    Runs whose sampling is ahead of training tell no speeds, as their iterations do not begin and end with their work.

    Args:
        config: the run.
        requests: those of each iteration.
        before: what to do before each iteration.
    """
    tokenizer = load_tokenizer(config.policy.path)
    prompts = [
        Prompt(uid=f"{index}", content=" ".join(map(str, ids)), row={}, source="random", token_ids=ids)
        for index, ids in enumerate(requests.prompts)
    ]
    with (
        open_run(config, "ppo") as run,
        running_groups(config, tokenizer, config.policy.path, run.directory.logs, to_the_limit=True) as groups,
    ):
        loop = MeasuredLoop(config, run, groups, prompts, [])
        loop.before = before
        loop.rollouts = rollouts = KnownLengths(config, groups, prompts, [], loop.ledger, loop.activity)
        rollouts.lengths = requests.lengths
        loop.train()
        samples = Samples(list(map(len, requests.prompts)), requests.lengths)
        cells = [] if config.ppo.max_staleness else engine_cells(config, groups.rollout, samples)
        metrics = run.directory.read_metrics()[1:]
    timeline = read_timeline(run.directory.path)
    if not config.ppo.max_staleness:
        cells += run_cells(config, timeline, metrics, samples, len(os.sched_getaffinity(0)))
    return _rows(metrics, timeline), cells


def _rows(metrics: list[dict[str, Any]], timeline: Timeline) -> list[dict[str, float]]:
    spans = iterations(timeline)
    rows = []
    for row in metrics:
        span = spans[row["step"]]
        of_iteration = cut(timeline, span.start, span.end)
        scoring = sum(
            one.end - one.start
            for actor, found in of_iteration.items()
            for one in found
            if actor != "driver" and one.name in SCORING
        )
        rows.append(
            {name: row[f"time/{name}"] for name in ("iteration", *PARTS)}
            | {
                "end_to_end": span.end - spans[row["step"] - 1].end,  # of the iteration before
                "nobody_busy": nobody_busy(timeline, span.start, span.end),
                "scoring_hidden": max(0.0, 1.0 - row["time/score"] / scoring),
            }
        )
    return rows
