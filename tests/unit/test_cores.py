"""Binding a process to cores of its node."""

import os
import subprocess
import sys

import pytest

from rlhf_ray.config.load import from_dict
from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.plan import make_plan
from rlhf_ray.runtime.cores import bind_to_cores, cores_environment

PROGRAM = """
import os, threading
from rlhf_ray.runtime.cores import bind_to_cores

ready, done = threading.Event(), threading.Event()
before = threading.Thread(target=lambda: (ready.wait(), print(os.sched_getaffinity(0))), daemon=True)
before.start()
bind_to_cores()
ready.set()
before.join()
print(os.sched_getaffinity(0))
"""


def ppo(**placement):
    values = {
        "run": {"dir": "runs/x"},
        "data": {"path": "prompts.jsonl"},
        "policy": {"path": "model"},
        "critic": {"init": "policy"},
        "reward": {"normalize": "none", "functions": [{"path": "rewards:length"}]},
        "rollout": {"kv_cache_gib": 0.5},
        "ppo": {"iterations": 1, "prompts_per_iteration": 1},
        "placement": placement,
    }
    return from_dict(values, "ppo", [], "a test")


def run(cores: list[int]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | cores_environment(cores)
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)


def test_all_threads_are_bound_those_that_run_already_too():
    core = max(os.sched_getaffinity(0))
    assert run([core]).stdout == f"{{{core}}}\n{{{core}}}\n"


def test_without_cores_nothing_is_bound(monkeypatch: pytest.MonkeyPatch):
    before = os.sched_getaffinity(0)
    monkeypatch.delenv("RLHF_RAY_CORES", raising=False)
    bind_to_cores()
    assert cores_environment([]) == {}
    assert os.sched_getaffinity(0) == before


def test_a_core_that_the_node_has_not_is_one_error():
    found = run([100_000])
    assert "ResourceError: placement.cores: found [100000], but the node has the cores [" in found.stderr


def test_the_plan_says_which_cores_a_group_has():
    assert make_plan(ppo(cores={"rollout": [0, 1]})).cores == {"rollout": [0, 1]}


@pytest.mark.parametrize("cores", [[], [-1]])
def test_no_cores_and_negative_ones_are_refused(cores: list[int]):
    with pytest.raises(ConfigError, match=r"placement.cores.*list the numbers of cores, or leave rollout out for all"):
        ppo(cores={"rollout": cores})
