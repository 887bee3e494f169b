"""`rlhf-ray bench scaling`: how many engines a driver can serve, with engines that only pretend to sample.

All between the engines' answers and the driver's list of trajectories is that of a run: the pool, Ray's streams, the
trajectories with their tokens and log-probabilities, and how an engine hands them over. Only vLLM is missing: a
simulated engine waits as long as a response would take. Many of them live in one process.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray

from rlhf_ray.bench.workload import Fixed, LogNormal, make_workload
from rlhf_ray.errors import EngineError
from rlhf_ray.rollout.engine import RolloutEngine, SampleRequest
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.runtime.cluster import actor_environment
from rlhf_ray.runtime.patience import Patience
from rlhf_ray.runtime.remote import START_TIMEOUT_S, get
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.trajectory import Trajectory, VersionSpan

PROMPT = Fixed(64)
RESPONSE = LogNormal(256, 0.9, 2048)
VOCABULARY = 32_000
TIMEOUT_S = 600.0


class SimulatedEngines(RolloutEngine):
    """A Ray actor in the place of many rollout engines, which starts no vLLM.

    Args:
        tokens_per_s: of one response.
    """

    def __init__(self, tokens_per_s: float) -> None:
        self._tokens_per_s = tokens_per_s
        self._version = 0

    async def ready(self) -> bool:
        """Answers once the process is up."""
        return True

    async def _sample(self, request: SampleRequest) -> Trajectory:
        """A made-up response, after the time that its tokens would take."""
        length = request.max_new_tokens
        await asyncio.sleep(length / self._tokens_per_s)
        numbers = np.random.default_rng(request.seed)
        ids = numbers.integers(VOCABULARY, size=length, dtype=np.int32)
        logprobs = -numbers.random(length, np.float32)
        span = VersionSpan(0, 0, length)
        prompt_ids = np.array(request.prompt_ids, np.int32)
        return Trajectory(request.uid, request.sample, prompt_ids, ids, logprobs, "length", [span])


class SimulatedPool(RolloutPool):
    """The pool of a run, over simulated engines."""

    def __init__(self, actors: list[Any], engines: int) -> None:
        nothing: Any = SimpleNamespace()
        super().__init__(nothing, nothing, Supervisor(Path(), Patience(TIMEOUT_S, TIMEOUT_S)))
        self._serving = {rank: actors[rank % len(actors)] for rank in range(engines)}


def bench_driver(engines: list[int], requests: int, processes: int, tokens_per_s: float) -> Iterator[dict[str, Any]]:
    """Sample twice over each number of simulated engines; yields a row for each. Ray must be connected.

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
    before = _resident_bytes()
    first = _sample(pool, requests)
    second = _sample(pool, requests)
    count = 2 * len(pool.engines) * requests
    seconds = first.seconds + second.seconds
    spent = first.cpu_s + second.cpu_s
    growth = first.memory - before
    return {
        "driver_cpu_ms_per_trajectory": 1000 * spent / count,
        "driver_cpu_share": spent / seconds,
        "seconds": seconds,
        "trajectories_per_s": count / seconds,
        "memory_growth_mib": growth / 2**20,
        "memory_growth_kib_per_request": 2 * growth / 2**10 / count,
        # Memory that what is over leaves behind would be added here.
        "memory_growth_again_mib": (second.memory - first.memory) / 2**20,
    }


@dataclass(frozen=True)
class _Sampled:
    """One call: the driver's CPU time and the time it took, in seconds, and the most memory meanwhile, in bytes."""

    cpu_s: float
    seconds: float
    memory: int


def _sample(pool: RolloutPool, requests: int) -> _Sampled:
    count = len(pool.engines) * requests
    workload = make_workload(PROMPT, RESPONSE, count, 1, VOCABULARY, 0)
    asked = [
        SampleRequest(f"{index}", 0, ids, index, 1.0, length)
        for index, (ids, length) in enumerate(zip(workload.prompts, workload.lengths, strict=True))
    ]
    cpu, started = time.process_time(), time.monotonic()
    found = tokens = memory = 0
    for finished in pool.generate(asked):
        found += len(finished)
        tokens += sum(len(one.response_ids) for one in finished)
        memory = max(memory, _resident_bytes())
    if (found, tokens) != (count, workload.generated_tokens):
        raise EngineError(f"{found} responses of {tokens} tokens came back of {count} of {workload.generated_tokens}")
    return _Sampled(time.process_time() - cpu, time.monotonic() - started, memory)


def _resident_bytes() -> int:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
