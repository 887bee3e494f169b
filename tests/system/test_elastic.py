"""Engines that join, leave and die while a run goes on: its numbers are those of a run with one engine throughout."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from ppo_runs import Inputs, make_inputs, rows_of

from rlhf_ray.config import PPOConfig
from rlhf_ray.driver import ppo
from rlhf_ray.driver.control import ask_for_engines, wanted_engines
from rlhf_ray.errors import StageError
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.stages.ppo import train_ppo
from rlhf_ray.tracking.logs import LOGS

pytestmark = pytest.mark.system

# What is asked for before each iteration; in the third, one engine is killed while it samples.
SIZES = [1, 3, 3, 3, 2]
KILLED_IN = 2
CHANGING = ("time/", "rollout/tokens_per_second", "rollout/engines")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("elastic"))


def config_of(inputs: Inputs, name: str) -> PPOConfig:
    return inputs.config(name, ppo={"iterations": len(SIZES)}, critic={"warmup_iterations": 2})


@pytest.fixture(scope="module")
def steady(ray_cluster: None, inputs: Inputs) -> PPOConfig:
    config = config_of(inputs, "steady")
    train_ppo(config)
    return config


@pytest.fixture(scope="module")
def elastic(ray_cluster: None, inputs: Inputs) -> PPOConfig:
    """The same run, scaled before each iteration; newcomers are waited for, so that no clock decides the outcome."""
    config = config_of(inputs, "elastic")
    sizes = iter(SIZES)
    sample = RolloutPool.generate
    calls = 0

    def ask(run_dir: Path) -> int | None:
        ask_for_engines(run_dir, next(sizes))
        return wanted_engines(run_dir)

    def wait(pool: RolloutPool) -> bool:
        starting = [up for _, up in pool._joining.values()]
        return bool(starting) and bool(ray.wait(starting, num_returns=len(starting), timeout=240)[0])

    def generate(pool: RolloutPool, requests: Any) -> Iterator[Any]:
        nonlocal calls
        stream = sample(pool, requests)
        first = next(stream)
        if calls == KILLED_IN:
            ray.kill(pool._serving[1])
        calls += 1
        yield first
        yield from stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "wanted_engines", ask)
        patch.setattr(RolloutPool, "newcomers_ready", wait)
        patch.setattr(RolloutPool, "generate", generate)
        train_ppo(config)
    return config


def test_engines_join_leave_and_are_replaced(elastic: PPOConfig):
    assert [row["rollout/engines"] for row in rows_of(elastic)] == [1, 3, 2, 3, 2]


def test_nothing_is_lost_or_repeated_and_every_number_is_that_of_one_engine(steady: PPOConfig, elastic: PPOConfig):
    for expected, found in zip(rows_of(steady), rows_of(elastic), strict=True):
        for row in (expected, found):
            for key in [key for key in row if key.startswith(CHANGING)]:
                del row[key]
        assert found == expected
    for step in range(len(SIZES)):
        name = f"samples/step_{step:06d}.parquet"
        tables = [pq.read_table(Path(config.run.dir) / name) for config in (steady, elastic)]
        assert tables[0].equals(tables[1])


def test_no_process_of_an_engine_outlives_it(elastic: PPOConfig):
    """vLLM's own processes would go on where their actor was killed, and hold its memory."""
    logs = str(Path(elastic.run.dir) / "logs")
    deadline = time.monotonic() + 20
    while left := processes_of(logs):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def processes_of(logs: str) -> list[str]:
    """Names of the living processes that log into the run's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(LOGS) == logs and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_only_a_running_ppo_run_is_scaled(elastic: PPOConfig, tmp_path: Path):
    with pytest.raises(StageError, match="no process works on the run in"):
        ask_for_engines(Path(elastic.run.dir), 2)
    with pytest.raises(StageError, match="holds no run; name the directory of a running PPO run"):
        ask_for_engines(tmp_path, 2)
    (tmp_path / "config.yaml").write_text("run:\n  dir: x\nsft: {}\n")
    with pytest.raises(StageError, match="only PPO has engines"):
        ask_for_engines(tmp_path, 2)
