"""What a process does, as Prometheus reads it off the node."""

import threading
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from rlhf_ray.tracking.activity import activity
from rlhf_ray.tracking.logs import ACTOR, LOGS
from rlhf_ray.tracking.prometheus_names import exported_name

pytestmark = pytest.mark.system

WANTED = {
    "rlhf_iterations_total": 1.0,
    "rlhf_queue": 40.0,
    "rlhf_weight_version": 7.0,
    "rlhf_tokens_total": 150.0,
    "rlhf_responses_total": 3.0,
    "rlhf_weight_transfers_total": 1.0,
}


def read(port: int) -> dict[str, float]:
    """The metrics of the worker on this node's page, by exported name."""
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    lines = [line for line in page.splitlines() if 'actor="rollout-3"' in line and 'run="run"' in line]
    assert all('group="rollout"' in line for line in lines)
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_a_nodes_metrics_page_shows_what_its_processes_did(ray_cluster: None, tmp_path: Path):
    class Worker:  # in the test, so that it travels by value: other processes cannot import this module
        def work(self) -> None:
            with activity().busy("generate", tokens=100, responses=2):
                activity().count_tokens(20, 1)
            activity().hold_version(7)
            activity().count_iteration()
            threading.Thread(target=self.go_on, daemon=True).start()

        def go_on(self) -> None:
            """A call that does not end while the test looks."""
            with activity().busy("generate") as call:
                activity().owes(call, 40)
                activity().count_tokens(30, 0)
                time.sleep(600)

    (tmp_path / "run").mkdir()
    environment = {ACTOR: "rollout-3", LOGS: str(tmp_path / "run" / "logs")}
    worker = ray.remote(Worker).options(num_cpus=0, runtime_env={"env_vars": environment}).remote()
    ray.get(worker.work.remote(), timeout=60)
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    wanted = {exported_name(name): value for name, value in WANTED.items()}
    deadline = time.monotonic() + 60
    found: dict[str, float] = {}
    while not wanted.items() <= found.items():
        assert time.monotonic() < deadline, found
        time.sleep(1)
        found = read(node["MetricsExportPort"])
    assert found[exported_name("rlhf_state")] == 2
    assert found[exported_name("rlhf_tokens_per_second")] > 0
    # The call that goes on counts already, and more from second to second.
    busy = exported_name("rlhf_busy_seconds_total")
    before = found[busy]
    while found[busy] < before + 2:
        assert time.monotonic() < deadline, found
        time.sleep(1)
        found = read(node["MetricsExportPort"])
    ray.kill(worker)
