"""PPO on a simulated cluster that gets a node while it runs, as an autoscaler would add it; see `test_growing.py`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from ppo_runs import make_inputs, rows_of
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.stages.ppo import train_ppo

# The node comes before this iteration, and its engine is waited for, so that no clock decides the outcome.
GROWS_BEFORE = 2
CPUS_OF_ONE_ENGINE = 2.0  # and of all other groups


def main(folder: Path) -> None:
    inputs = make_inputs(folder)
    config = inputs.config(
        "growing",
        rollout={
            "cpus": 0.5,
            "kv_cache_gib": 0.05,
            "vllm": {"enforce_eager": True},
            "max_new_tokens": 12,
            "engines": 2,
            "min_engines": 1,
        },
        placement={"autoscaling": True},
    )
    cluster = Cluster()
    cluster.add_node(num_cpus=CPUS_OF_ONE_ENGINE, labels={"name": "first"}, include_dashboard=False)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    found: dict[str, Any] = {"asked": [], "hosts": {}}
    calls = 0

    def grow(pool: RolloutPool) -> bool:
        """In place of asking whether an engine is up."""
        nonlocal calls
        states = sorted(group["state"] for group in placement_group_table().values())
        found["asked"].append(states)
        calls += 1
        if calls <= GROWS_BEFORE:
            return False
        if calls == GROWS_BEFORE + 1:
            cluster.add_node(num_cpus=1, labels={"name": "second"})
        starting = [up for _, up in pool._joining.values()]
        return bool(starting) and bool(ray.wait(starting, timeout=240)[0])

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RolloutPool, "newcomers_ready", grow)
            train_ppo(config)
        found["rows"] = rows_of(config)
        found["left"] = [g["state"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    finally:
        ray.shutdown()
        cluster.shutdown()
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
