"""The metrics of a process: right while it works, not only afterwards."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.rollout.engine import RolloutEngine, SampleRequest
from rlhf_ray.tracking import activity
from rlhf_ray.tracking.activity import Activity, group_of
from rlhf_ray.trajectory import Trajectory, VersionSpan


class Exported:
    """Stands for a metric of Ray: what was told of it."""

    found: dict[str, "Exported"]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.value = 0.0
        Exported.found[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.tags = tags

    def set(self, value: float) -> None:
        self.value = value

    def inc(self, value: float) -> None:
        assert value > 0
        self.value += value


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exported]:
    """What goes to Prometheus of the recorders that a test makes, by metric."""
    Exported.found = {}
    monkeypatch.setattr(activity.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(activity, "Gauge", Exported)
    monkeypatch.setattr(activity, "Counter", Exported)
    monkeypatch.setattr(activity, "NOW_EVERY_S", 0.05)
    return Exported.found


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("actor", "group"),
    [
        ("rollout-3", "rollout"),
        ("rollout-0-part-1", "rollout"),
        ("reward-model_0-1", "reward"),
        ("reward-num_tokens", "reward"),
        ("policy-12", "policy"),
        ("driver", "driver"),
    ],
)
def test_a_metric_bears_its_processs_group(exported: dict[str, Exported], actor: str, group: str, tmp_path: Path):
    Activity(actor, tmp_path).close()
    assert {one.tags["group"] for one in exported.values()} == {group} == {group_of(actor)}
    assert {one.tags["actor"] for one in exported.values()} == {actor}


def test_what_is_sampled_in_an_open_call_has_a_rate_that_falls_to_nothing(
    exported: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(activity, "RATE_KEPT_S", 0.5)
    recorder = Activity("rollout-0", tmp_path)
    rate = exported["rlhf_tokens_per_second"]
    began = time.monotonic()
    with recorder.busy("generate"):
        assert rate.value == 0
        time.sleep(0.2)
        recorder.count_tokens(100, 2)
        first = rate.value
        assert 0 < first <= 100 / 0.2
        wait_until(lambda: rate.value < first / 2)  # nothing comes while the call goes on
        recorder.count_tokens(1000, 2)
        least = 1100 / (time.monotonic() - began)
        assert rate.value >= least * 0.9
    last = rate.value
    assert last >= least * 0.5
    with recorder.busy("transfer"):  # which tokens are no matter of
        pass
    assert rate.value == last
    wait_until(lambda: rate.value == 0)
    wait_until(lambda: json.loads((tmp_path / "trace" / "rollout-0.now").read_text())["rlhf_tokens_per_second"] == 0)
    recorder.close()


def test_a_call_that_says_its_tokens_has_their_rate_at_its_end(exported: dict[str, Exported], tmp_path: Path):
    recorder = Activity("policy-0", tmp_path)
    started = time.monotonic()
    with recorder.busy("step", tokens=100):
        time.sleep(0.2)
    assert 100 / (time.monotonic() - started) * 0.9 <= exported["rlhf_tokens_per_second"].value <= 100 / 0.2
    recorder.close()


def test_busy_seconds_grow_while_a_call_goes_on_and_count_no_moment_twice(
    exported: dict[str, Exported], tmp_path: Path
):
    recorder = Activity("policy-0", tmp_path)
    busy = exported["rlhf_busy_seconds_total"]
    time.sleep(0.2)
    assert busy.value == 0
    with recorder.busy("step"):
        started = time.monotonic()
        with recorder.busy("forward"):
            time.sleep(0.3)
            assert 0 < busy.value <= 0.31
        time.sleep(0.3)
        seen = time.monotonic() - started
        assert busy.value > seen - 0.3
    assert seen <= busy.value <= time.monotonic() - started + 0.01
    after = busy.value
    time.sleep(0.2)
    assert busy.value == after
    recorder.close()


def test_calls_in_many_threads_add_up(exported: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activity, "NOW_EVERY_S", 0.001)
    recorder = Activity("rollout-0", tmp_path)

    def work() -> None:
        for _ in range(200):
            with recorder.busy("generate", tokens=1, responses=1):
                recorder.count_tokens(1, 0)

    started = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exported["rlhf_tokens_total"].value == 3200
    assert exported["rlhf_responses_total"].value == 1600
    assert 0 < exported["rlhf_busy_seconds_total"].value <= time.monotonic() - started
    assert exported["rlhf_queue"].value == 0
    recorder.close()
    assert len((tmp_path / "trace" / "rollout-0.jsonl").read_text().splitlines()) == 1600


def test_the_queue_is_what_every_call_owes(exported: dict[str, Exported], tmp_path: Path):
    recorder = Activity("rollout-0", tmp_path)
    queue = exported["rlhf_queue"]
    with recorder.busy("generate") as one, recorder.busy("generate") as other:
        assert queue.value == 2
        recorder.owes(one, 300)
        recorder.owes(other, 20)
        assert queue.value == 320
        recorder.owes(one, 0)
        assert queue.value == 20
    assert queue.value == 0
    recorder.close()


def test_an_engine_tells_how_many_responses_it_owes_and_how_fast_it_samples(
    exported: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recorder = Activity("rollout-0", tmp_path)
    monkeypatch.setattr("rlhf_ray.rollout.engine.activity", lambda: recorder)
    gates = [asyncio.Event() for _ in range(5)]

    class Engine(RolloutEngine):
        """Without vLLM: each request is answered once its gate is open."""

        def __init__(self) -> None:
            self._version = 0

        async def _sample(self, request: SampleRequest) -> Trajectory:
            await gates[request.sample].wait()
            spans = [VersionSpan(0, 0, 3)]
            ids = np.array([2, 3, 4], np.int32)
            return Trajectory(request.uid, request.sample, ids[:1], ids, np.zeros(3, np.float32), "stop", spans)

    async def drive() -> list[tuple[float, float]]:
        stream = Engine().generate([SampleRequest("a", sample, [1], 0, 1.0, 8) for sample in range(5)])
        seen = []
        for gate in gates:
            answer = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.05)
            queue = exported["rlhf_queue"].value
            gate.set()
            await answer
            seen.append((queue, exported["rlhf_tokens_per_second"].value))
        assert [one async for one in stream] == []
        return seen

    seen = asyncio.run(drive())
    assert [queue for queue, _ in seen] == [5, 4, 3, 2, 1]
    assert all(rate > 0 for _, rate in seen)
    assert exported["rlhf_queue"].value == 0
    recorder.close()
