"""The inputs and the common configuration of the tests' PPO runs."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.placement_group import placement_group_table
from tiny_models import make_llama

from rlhf_ray.config import PPOConfig, from_dict
from rlhf_ray.tracking.logs import LOGS

TOLERANCE = 1e-5  # of fp32 log-probabilities
ITERATIONS = 4


def processes_of(logs: str) -> dict[int, str]:
    """The living processes that log into the run's folder, and their names."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(LOGS) == logs and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@dataclass
class Inputs:
    """Models and data of all runs, and what their configurations have in common."""

    policy: str
    reward: str
    prompts: str
    demonstrations: str
    folder: Path

    def config(self, name: str, **sections: dict[str, Any]) -> PPOConfig:
        """A run called `name`; `sections` change keys of the common configuration."""
        values: dict[str, dict[str, Any]] = {
            "run": {"dir": str(self.folder / name), "seed": 3, "timeout_s": 120.0},
            "data": {"path": self.prompts, "max_tokens": 32, "as_chat": True},
            "policy": {"path": self.policy, "cpus": 0.5, "learning_rate": 3e-3},
            "critic": {"cpus": 0.5, "learning_rate": 3e-3},
            "training": {"micro_batch_tokens": 1024},
            "reference": {"cpus": 0.25, "micro_batch_tokens": 1024},
            "reward": {"cpus": 0.25, "models": [{"path": self.reward}]},
            "rollout": {
                "cpus": 0.5,
                "kv_cache_gib": 0.05,
                "vllm": {"enforce_eager": True},
                "max_new_tokens": 12,
                "samples_per_prompt": 2,
            },
            "ppo": {"iterations": ITERATIONS, "prompts_per_iteration": 8},
        }
        for section, changes in sections.items():
            values[section] = values.get(section, {}) | changes
        return from_dict(values, "ppo")


def make_inputs(folder: Path) -> Inputs:
    """Tiny models, twenty prompts and sixteen demonstrations."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"jump over {i}", "answer": i}) + "\n" for i in range(20)))
    demonstrations = folder / "demonstrations.jsonl"
    demonstrations.write_text(
        "".join(json.dumps({"prompt": f"quick {i}", "completion": f"the fox {i}"}) + "\n" for i in range(16))
    )
    return Inputs(
        policy=make_llama(folder / "policy"),
        reward=make_llama(folder / "reward", seed=1, scalar=True),
        prompts=str(prompts),
        demonstrations=str(demonstrations),
        folder=folder,
    )


def rows_of(config: PPOConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


def held() -> tuple[set[str], int]:
    """Named actors and placement groups that the cluster still holds."""
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}, len(groups)


@contextmanager
def nothing_left() -> Iterator[None]:
    """The block gives back all that it takes of the cluster, soon after its end, however it ends."""
    before = held()
    try:
        yield
    finally:
        deadline = time.monotonic() + 20
        while held() != before:
            assert time.monotonic() < deadline, f"held before: {before}; still held: {held()}"
            time.sleep(0.2)
