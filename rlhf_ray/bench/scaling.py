"""`rlhf-ray bench scaling`: how many engines a driver can serve, with engines that only pretend to sample.

All between the engines' answers and the driver's list of trajectories is that of a run: the pool, Ray's streams, the
trajectories with their tokens and log-probabilities. Only vLLM is missing: a simulated engine waits as long as a
response would take. Many of them live in one process.
"""

import asyncio
import random
import resource
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import ray

from rlhf_ray.bench.workload import Fixed, LogNormal, make_workload
from rlhf_ray.errors import EngineError
from rlhf_ray.rollout.engine import SampleRequest
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.runtime.cluster import actor_environment
from rlhf_ray.runtime.patience import Patience
from rlhf_ray.runtime.remote import START_TIMEOUT_S, get
from rlhf_ray.trajectory import Trajectory, VersionSpan

PROMPT = Fixed(64)
RESPONSE = LogNormal(256, 0.9, 2048)
VOCABULARY = 32_000
TIMEOUT_S = 600.0


class SimulatedEngines:
    """A Ray actor in the place of many rollout engines.

    Args:
        tokens_per_s: of one response.
    """

    def __init__(self, tokens_per_s: float) -> None:
        self._tokens_per_s = tokens_per_s

    def ready(self) -> bool:
        """Answers once the process is up."""
        return True

    async def generate(self, requests: list[SampleRequest]) -> AsyncIterator[list[Trajectory]]:
        """Made-up responses to every request, each after the time that its tokens would take."""
        started = time.monotonic()
        for request in sorted(requests, key=lambda one: one.max_new_tokens):
            length = request.max_new_tokens
            await asyncio.sleep(max(0.0, started + length / self._tokens_per_s - time.monotonic()))
            numbers = random.Random(request.seed)
            ids = [numbers.randrange(VOCABULARY) for _ in range(length)]
            logprobs = [-numbers.random() for _ in range(length)]
            span = VersionSpan(0, 0, length)
            yield [Trajectory(request.uid, request.sample, request.prompt_ids, ids, logprobs, "length", [span])]


class SimulatedPool(RolloutPool):
    """The pool of a run, over simulated engines."""

    def __init__(self, actors: list[Any], engines: int) -> None:
        nothing: Any = SimpleNamespace()
        super().__init__(nothing, nothing, Patience(TIMEOUT_S, TIMEOUT_S))
        self._serving = {rank: actors[rank % len(actors)] for rank in range(engines)}


def bench_driver(engines: list[int], requests: int, processes: int, tokens_per_s: float) -> Iterator[dict[str, Any]]:
    """Sample over each number of simulated engines; yields a row for each. Ray must be connected.

    Args:
        engines: how many.
        requests: under way at each engine at the start; all end by themselves.
        processes: that simulate the engines.
        tokens_per_s: of one response.
    """
    actor_class: Any = ray.remote(SimulatedEngines)
    options = {"num_cpus": 0, "max_concurrency": 10_000, "runtime_env": {"env_vars": actor_environment(1)}}
    actors = [actor_class.options(**options).remote(tokens_per_s) for _ in range(processes)]
    try:
        get([actor.ready.remote() for actor in actors], "simulated engines: start-up", START_TIMEOUT_S)
        for count in engines:
            yield {"engines": count, "in_flight": count * requests, **_measure(SimulatedPool(actors, count), requests)}
    finally:
        for actor in actors:
            ray.kill(actor)


def _measure(pool: RolloutPool, requests: int) -> dict[str, float]:
    count = len(pool.engines) * requests
    workload = make_workload(PROMPT, RESPONSE, count, 1, VOCABULARY, 0)
    asked = [
        SampleRequest(f"{index}", 0, ids, index, 1.0, length)
        for index, (ids, length) in enumerate(zip(workload.prompts, workload.lengths, strict=True))
    ]
    memory, cpu, started = _peak_bytes(), time.process_time(), time.monotonic()
    found = tokens = 0
    for finished in pool.generate(asked):
        found += len(finished)
        tokens += sum(len(one.response_ids) for one in finished)
    if (found, tokens) != (count, workload.generated_tokens):
        raise EngineError(f"{found} responses of {tokens} tokens came back of {count} of {workload.generated_tokens}")
    spent, seconds = time.process_time() - cpu, time.monotonic() - started
    return {
        "driver_cpu_ms_per_trajectory": 1000 * spent / count,
        "driver_cpu_share": spent / seconds,
        "seconds": seconds,
        "trajectories_per_s": count / seconds,
        "memory_growth_mib": (_peak_bytes() - memory) / 2**20,
        "memory_growth_kib_per_request": (_peak_bytes() - memory) / 2**10 / count,
    }


def _peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
