"""A PPO job submitted over HTTP to a cluster of five hosts, each with an address and a link of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.long]

SCRIPT = Path(__file__).with_name("hosts.py")


def run(folder: Path, engines: dict[str, int]) -> dict[str, Any]:
    """What `hosts.py` saw."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and `ip` (Debian: iproute2) for network namespaces")
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, timeout=30, check=False)
    if probe.returncode != 0:
        pytest.skip("this machine allows no network namespaces")
    out = folder / "found.json"
    command = [sys.executable, str(SCRIPT), str(out), json.dumps(engines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two engines, each on a host."""
    return run(tmp_path_factory.mktemp("hosts"), {"engines": 2})


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One engine, split over two hosts."""
    engines = {"engines": 1, "tensor_parallel": 2, "nodes_per_engine": 2}
    return run(tmp_path_factory.mktemp("split"), engines)


@pytest.mark.parametrize("name", ["found", "split"])
def test_the_job_runs_to_its_end(name: str, request: pytest.FixtureRequest):
    found = request.getfixturevalue(name)
    assert found["exit_code"] == 0, found["output"]
    assert len(found["metrics"]) == 4
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-5 for row in found["metrics"])
    assert all(row["rollout/probe_difference"] < 1e-5 for row in found["metrics"])


def test_every_group_sits_on_the_hosts_of_its_role(found: dict[str, Any]):
    actors = found["actors"]
    assert {actors["policy-0"], actors["policy-1"]} == {"trainer-a", "trainer-b"}
    assert {actors["rollout-0"], actors["rollout-1"]} == {"rollout-a", "rollout-b"}
    assert {actors[name] for name in ("reference-0", "reward-0", "critic-0")} == {"head"}


def test_gradients_and_weights_cross_the_links(found: dict[str, Any]):
    # A model of some 100,000 parameters in fp32: four optimizer steps, and five transfers to each engine.
    model = 4 * 90_000
    assert found["bytes"]["trainer-b"] > 4 * model
    assert found["bytes"]["rollout-a"] > 5 * model
    assert found["bytes"]["rollout-b"] > 5 * model


def test_an_engine_is_split_over_two_hosts_and_both_get_its_weights(split: dict[str, Any]):
    assert {split["actors"]["rollout-0"], split["actors"]["rollout-0-part-1"]} == {"rollout-a", "rollout-b"}
    model = 4 * 90_000
    assert split["bytes"]["rollout-a"] > 5 * model
    assert split["bytes"]["rollout-b"] > 5 * model
