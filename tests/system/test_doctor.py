"""`rlhf-ray doctor` on a real cluster of several nodes, all on this machine."""

import json
import os
import subprocess
import sys

import pytest
from ray.cluster_utils import Cluster
from tiny_models import make_llama

pytestmark = pytest.mark.system

OBJECT_STORE_BYTES = 128 * 2**20
PPO = """\
run: {{dir: {folder}/runs/p}}
data: {{path: prompts.jsonl, max_tokens: 32}}
policy: {{path: {folder}/policy, cpus: 0.5}}
critic: {{cpus: 0.5}}
reference: {{cpus: 0.1}}
reward: {{models: [{{path: {folder}/reward}}], cpus: 0.1}}
rollout: {{kv_cache_gib: 0.5, max_new_tokens: 32, cpus: 0.5}}
ppo: {{iterations: 1, prompts_per_iteration: 2}}
"""
# The deadline is shorter than a user's, so that the test of a node that cannot be reached does not take as long.
SCRIPT = """\
import sys
from rlhf_ray.cli import main
from rlhf_ray.doctor import run
run.PAIR_TIMEOUT_S = 6.0
main(["doctor", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def cluster():
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, and a configuration that names them."""
    folder = tmp_path_factory.mktemp("doctor")
    make_llama(folder / "policy")
    make_llama(folder / "reward", scalar=True)
    (folder / "ppo.yaml").write_text(PPO.format(folder=folder))
    return folder


def doctor(cluster, *arguments):
    """Runs the command in a process of its own; returns its exit code, output and standard error."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", SCRIPT, "--address", cluster.address, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return result.returncode, result.stdout, result.stderr


def test_a_healthy_cluster(cluster, folder):
    before = sorted(folder.rglob("*"))
    code, out, err = doctor(cluster, "--config", folder / "ppo.yaml")
    assert code == 0, out + err
    lines = out.splitlines()
    assert lines[0].split() == ["verdict", "check", "where", "found"]
    assert any(line.split(maxsplit=1)[0] == "ok" and "as the driver's" in line for line in lines)
    for found in (
        f"{folder} is the driver's",
        f"{folder}/policy is there",
        "ppo takes 1.7 of 2 CPU, 0 of 0 GPU",
        "all-reduce of 2 nodes over gloo: ",
    ):
        (line,) = [line for line in lines if found in line]
        assert line.startswith(("ok", "warning")), line
    assert lines[-1].startswith("0 problems, ")
    assert sorted(folder.rglob("*")) == before


def test_a_run_that_would_fail(cluster, folder):
    changes = [f"policy.path={folder}/sft", "policy.processes=3", "policy.gpus=1", "policy.cpus=0.1"]
    code, out, err = doctor(cluster, "--json", "--config", folder / "ppo.yaml", *changes)
    assert code == 1, err
    found = json.loads(out)
    assert found["healthy"] is False
    nodes = sorted(found["nodes"])
    assert len(nodes) == 2
    problems = [line for line in found["lines"] if line["verdict"] == "problem"]
    assert [line["check"] for line in problems] == ["models", "models", "placement"]
    assert sorted(line["where"] for line in problems[:2]) == nodes
    assert problems[0]["found"] == f"{folder}/sft is not there"
    assert "shared file system" in problems[0]["remedy"]
    assert "the run needs 3 (policy 3 x 1) and the cluster has 0" in problems[2]["found"]
    assert "set policy.gpus to 0 to run on CPU" in problems[2]["remedy"]


def test_a_configuration_that_the_nodes_cannot_hold_in_pieces_is_a_problem_as_for_a_run(cluster, folder):
    code, out, err = doctor(
        cluster,
        "--json",
        "--config",
        folder / "ppo.yaml",
        "rollout.engines=3",
        "rollout.cpus=0.2",
        "placement.spread=[rollout]",
    )
    assert code == 1, err
    (problem,) = [line for line in json.loads(out)["lines"] if line["verdict"] == "problem"]
    assert problem["check"] == "placement"
    assert "placement.spread puts its 3 bundles on a node each, and 2 nodes can hold one" in problem["found"]


OTHER_VERSION = """\
import sys
import ray
from rlhf_ray.cli import main
ray.__version__ = "2.0.1"
main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", [["plan", "configs/smoke_sft.yaml"], ["doctor"]])
def test_a_driver_of_another_version_of_ray_is_one_error(cluster, command):
    found = subprocess.run(
        [sys.executable, "-c", OTHER_VERSION, *command, "--address", cluster.address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (found.returncode, found.stdout) == (1, ""), found.stderr
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"error: --address: the Ray cluster at '{cluster.address}' has other versions than this")
    assert "Ray: 2.0.1" in line and "same versions of Ray and Python" in line


def test_a_node_that_the_collective_cannot_reach_is_named(cluster):
    cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES, env_vars={"GLOO_SOCKET_IFNAME": "nowhere0"})
    code, out, err = doctor(cluster, "--json")
    assert code == 1, out + err
    found = json.loads(out)
    (bad,) = {
        node
        for exchange in found["network"]
        for node, answer in zip(exchange["nodes"], exchange["answers"], strict=True)
        if "nowhere0" in answer.get("error", "")
    }
    problems = {line["where"]: line for line in found["lines"] if line["verdict"] == "problem"}
    assert len(problems) == 3
    assert problems[bad]["found"] == "reaches no neighbour, while these reach others"
    assert "set GLOO_SOCKET_IFNAME" in problems[bad]["remedy"]
