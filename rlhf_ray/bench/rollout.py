"""`rlhf-ray bench rollout`: how fast the engines sample, beside vLLM alone on the same requests in the same run."""

import itertools
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import ray

from rlhf_ray.bench.bare import BareEngine
from rlhf_ray.bench.reserved import reserved
from rlhf_ray.bench.workload import Lengths, Workload, describe, make_workload
from rlhf_ray.config.load import changed
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.driver.groups import engine_spec
from rlhf_ray.errors import EngineError
from rlhf_ray.models.loading import load_config
from rlhf_ray.placement.groups import Placement
from rlhf_ray.placement.plan import GroupDemand, demands
from rlhf_ray.rollout.engine import EngineSpec, SampleRequest
from rlhf_ray.rollout.options import check_options
from rlhf_ray.rollout.pool import RolloutPool, sampling_seed
from rlhf_ray.runtime.cluster import connection
from rlhf_ray.runtime.patience import Patience
from rlhf_ray.runtime.remote import START_TIMEOUT_S, get
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.stages.models import check_context

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """What is measured: every combination of the lists.

    Attributes:
        engines: numbers of engines.
        tensor_parallel: GPUs of each engine.
        concurrency: responses that an engine samples at a time.
        prompts: lengths of prompts.
        responses: lengths of responses.
        num_prompts: prompts of one measurement.
        samples: responses to each of them.
        repeats: measurements of each combination, after one that warms up and is not counted.
    """

    engines: list[int]
    tensor_parallel: list[int]
    concurrency: list[int]
    prompts: list[Lengths]
    responses: list[Lengths]
    num_prompts: int
    samples: int
    repeats: int

    @property
    def largest(self) -> int:
        """Tokens of the longest possible prompt and response."""
        return max(one.largest for one in self.prompts) + max(one.largest for one in self.responses)


class Side(Protocol):
    """One of the two that are compared."""

    def run(self, workload: Workload) -> float:
        """Seconds to sample all of it."""


@dataclass(frozen=True)
class System:
    """The rollout pool of a PPO run, on random weights."""

    pool: RolloutPool

    def run(self, workload: Workload) -> float:
        """From handing over the requests to the last finished trajectory in the driver."""
        requests = [
            SampleRequest(
                uid=f"{index}",
                sample=sample,
                prompt_ids=prompt,
                seed=sampling_seed(0, 0, f"{index}", sample),
                temperature=1.0,
                max_new_tokens=workload.lengths[index * workload.samples + sample],
            )
            for index, prompt in enumerate(workload.prompts)
            for sample in range(workload.samples)
        ]
        started = time.perf_counter()
        found = sum(len(one.response_ids) for finished in self.pool.generate(requests) for one in finished)
        seconds = time.perf_counter() - started
        if found != workload.generated_tokens:
            raise EngineError(f"the engines sampled {found} tokens where {workload.generated_tokens} were asked for")
        return seconds

    def observe(self, workload: Workload) -> tuple[float, list[dict[str, Any]]]:
        """Seconds to sample all of it while the engines keep statistics, and `EngineStatistics` of each."""
        self.pool.statistics()
        self.pool.keep_statistics(True)
        seconds = self.run(workload)
        self.pool.keep_statistics(False)
        return seconds, self.pool.statistics()


@dataclass(frozen=True)
class Bare:
    """As many engines of vLLM alone; each gets its share of the prompts at once."""

    engines: list[Any]
    timeout_s: float

    def run(self, workload: Workload, plain: bool = False) -> float:
        """Of the engine that takes longest, measured inside it; `plain` as in `BareEngine.run`."""
        count = len(self.engines)
        refs = [engine.run.remote(workload.part(index, count), plain) for index, engine in enumerate(self.engines)]
        return max(get(refs, "vLLM alone: sampling", self.timeout_s))


def bench_rollout(config: PPOConfig, sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Measure every combination; yields a row for each.

    Weights are random, so `policy.path` needs a config.json alone. The engines log into a folder beside `run.dir`,
    `<run.dir>-bench`, which all nodes must see.

    Raises:
        RlhfError: the model's context is too short, vLLM has no such option, the cluster is too small, or an engine
            failed.
    """
    check_options(config.rollout.vllm, gpu=config.rollout.gpus > 0)
    check_context(config.policy.path, sweep.largest, "prompt and response", config.policy.trust_remote_code)
    vocabulary = load_config(config.policy.path, trust_remote_code=config.policy.trust_remote_code).vocab_size
    with connection(config.run.ray_address):
        for tensor_parallel, engines, concurrency in itertools.product(
            sweep.tensor_parallel, sweep.engines, sweep.concurrency
        ):
            chosen = {"tensor_parallel": tensor_parallel, "engines": engines, "max_concurrency": concurrency}
            # The engines are alone here: with whom they share in a run, or how many are enough, does not count; and
            # each is on one node, as vLLM alone is.
            alone = ["placement.share=[]", "rollout.min_engines=null", "rollout.nodes_per_engine=1"]
            alone += ["policy.gpus=1"] * (config.policy.gpus > 0)
            one = changed(config, [*(f"rollout.{key}={value}" for key, value in chosen.items()), *alone])
            assert isinstance(one, PPOConfig)
            spec = replace(engine_spec(one, eos_token_ids=()), max_model_len=sweep.largest, statistics=True)
            (demand,) = (demand for demand in demands(one) if demand.name == "rollout")
            for row in _measure(one, replace(demand, processes=engines), spec, sweep, vocabulary):
                yield {**chosen, **row}


def _measure(
    config: PPOConfig, demand: GroupDemand, spec: EngineSpec, sweep: Sweep, vocabulary: int
) -> Iterator[dict[str, Any]]:
    """All lengths on one set of engines."""
    cells = list(itertools.product(sweep.prompts, sweep.responses))

    def workloads(index: int, first: int, count: int) -> list[Workload]:
        """Of one cell; no two have the same prompts, which a cache would know."""
        seeds = range(1000 * index + first, 1000 * index + first + count)
        return [make_workload(*cells[index], sweep.num_prompts, sweep.samples, vocabulary, seed) for seed in seeds]

    turns_of_cell = sweep.repeats + 1
    with reserved(config, [demand]) as placement:
        sides: dict[str, AbstractContextManager[Side]] = {
            "system": _system(config, spec, placement),
            "bare": _bare(config, spec, placement, demand.processes),
        }
        # In turns, so that both see the same machine; GPUs have no room for both.
        turns = [["system"], ["bare"]] if spec.gpu else [["system", "bare"]]
        seconds: dict[str, list[list[float]]] = {name: [[] for _ in cells] for name in sides}
        plain: list[list[float]] = [[] for _ in cells]
        observed: list[tuple[float, list[dict[str, Any]]]] = []
        for names in turns:
            with ExitStack() as stack:
                open_sides = {name: stack.enter_context(sides[name]) for name in names}
                for index in range(len(cells)):
                    of_plain = workloads(index, turns_of_cell, turns_of_cell)
                    for repeat, workload in enumerate(workloads(index, 0, turns_of_cell)):
                        for name in names if repeat % 2 else reversed(names):
                            seconds[name][index].append(open_sides[name].run(workload))
                        if isinstance(bare := open_sides.get("bare"), Bare):
                            plain[index].append(bare.run(of_plain[repeat], plain=True))
                    if isinstance(system := open_sides.get("system"), System):
                        observed.append(system.observe(*workloads(index, 2 * turns_of_cell, 1)))
    units = demand.processes * (demand.gpus or demand.cpus)
    for index, (prompt, response) in enumerate(cells):
        yield {
            "prompt_tokens": describe(prompt),
            "response_tokens": describe(response),
            **_rates(workloads(index, 0, 1)[0], seconds["system"][index], seconds["bare"][index], plain[index], units),
            **_seen(*observed[index]),
        }


@contextmanager
def _system(config: PPOConfig, spec: EngineSpec, placement: Placement) -> Iterator[Side]:
    # Lengths differ from cell to cell, so that none says how long another may take.
    patience = Patience(config.run.timeout_s, config.run.timeout_s)
    with Supervisor(placement.logs.parent, patience) as supervisor:
        pool = RolloutPool(spec, placement, supervisor)
        pool.launch()
        try:
            pool.start()
            pool.serve_random_weights()
            yield System(pool)
        finally:
            pool.stop()


@contextmanager
def _bare(config: PPOConfig, spec: EngineSpec, placement: Placement, count: int) -> Iterator[Side]:
    engines: list[Any] = []
    for rank in range(count):
        options = placement.options("rollout", rank) | {"name": f"bare-{rank}"}
        if not spec.gpu:
            options["num_cpus"] = 0  # the rollout engine beside it, idle meanwhile, holds the reserved ones
        engines.append(ray.remote(BareEngine).options(**options).remote(spec))
    try:
        get([engine.ready.remote() for engine in engines], "vLLM alone: start-up", START_TIMEOUT_S)
        yield Bare(engines, config.run.timeout_s)
    finally:
        for engine in engines:
            ray.kill(engine)


def _rates(
    workload: Workload, system: list[float], bare: list[float], plain: list[float], units: float
) -> dict[str, Any]:
    """How fast one combination is; the first measurement of each side warmed up."""
    generated, total = workload.generated_tokens, workload.total_tokens
    return {
        "requests": len(workload.lengths),
        "generated_tokens": generated,
        "total_tokens": total,
        "warm_up_s": {"system": system[0], "bare": bare[0]},
        "generated_tokens_per_s": spread([generated / s for s in system[1:]]),
        "total_tokens_per_s": spread([total / s for s in system[1:]]),
        "generated_tokens_per_s_per_unit": spread([generated / s / units for s in system[1:]]),
        "bare_generated_tokens_per_s": spread([generated / s for s in bare[1:]]),
        "share_of_bare": spread([b / s for s, b in zip(system[1:], bare[1:], strict=True)]),
        "share_of_plain": spread([p / s for s, p in zip(system[1:], plain[1:], strict=True)]),
    }


def _seen(seconds: float, statistics: list[dict[str, Any]]) -> dict[str, Any]:
    """What the engines told of a measurement that took so long."""
    pooled = {key: [value for one in statistics for value in one[key]] for key in ("first_token_s", "latency_s")}
    queries = sum(one["prefix_queries"] for one in statistics)
    return {
        "first_token_s": percentiles(pooled["first_token_s"]),
        "latency_s": percentiles(pooled["latency_s"]),
        "idle_share": 1 - sum(one["busy_s"] for one in statistics) / (seconds * len(statistics)),
        "kv_cache_peak": max((one["kv_cache_peak"] for one in statistics), default=math.nan),
        "preemptions": sum(one["preemptions"] for one in statistics),
        "prefix_hit_share": sum(one["prefix_hits"] for one in statistics) / queries if queries else 0.0,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, mean, sample standard deviation, minimum and maximum."""
    return {
        "median": float(np.median(values)),
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """50, 95 and 99 of a hundred are at most this."""
    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 95, 99)}
