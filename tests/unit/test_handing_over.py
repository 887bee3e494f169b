"""Which responses an engine hands over together, without vLLM."""

import asyncio

import numpy as np
import pytest

from rlhf_ray.rollout.engine import RolloutEngine, SampleRequest
from rlhf_ray.trajectory import Trajectory, VersionSpan


class Engine(RolloutEngine):
    """Each request is answered once its gate is open."""

    def __init__(self, requests: int) -> None:
        self._version = 0
        self.gates = [asyncio.Event() for _ in range(requests)]

    async def _sample(self, request: SampleRequest) -> Trajectory:
        await self.gates[request.sample].wait()
        ids, logprobs = np.ones(1, np.int32), np.zeros(1, np.float32)
        return Trajectory(request.uid, request.sample, ids, ids, logprobs, "stop", [VersionSpan(0, 0, 1)])


async def handed_over(opened: list[list[int]]) -> list[list[int]]:
    """The samples of each answer, where groups of gates open one after the other."""
    engine = Engine(sum(map(len, opened)))
    found: list[list[int]] = []

    async def take() -> None:
        requests = [SampleRequest("a", sample, [1], 0, 1.0, 8) for sample in range(len(engine.gates))]
        async for answer in engine.generate(requests):
            found.append(sorted(one.sample for one in answer))

    taking = asyncio.ensure_future(take())
    for group in opened:
        await asyncio.sleep(0.05)
        for sample in group:
            engine.gates[sample].set()
    await asyncio.wait_for(taking, 60)
    return found


def test_responses_that_finish_shortly_after_one_are_handed_over_with_it(monkeypatch: pytest.MonkeyPatch):
    # For so many times as long as the call has taken: minutes, unless all are answered before.
    monkeypatch.setattr("rlhf_ray.rollout.engine.GATHER_SHARE", 10_000.0)
    assert asyncio.run(handed_over([[2], [0, 3], [1]])) == [[0, 1, 2, 3]]


def test_a_response_does_not_wait_for_one_that_takes_much_longer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlhf_ray.rollout.engine.GATHER_SHARE", 0.0)
    assert asyncio.run(handed_over([[2], [0, 3], [1]])) == [[2], [0, 3], [1]]
