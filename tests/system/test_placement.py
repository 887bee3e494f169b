"""Placement on a simulated cluster of several nodes: labels, spreading, ranks in node order, refusals.

The cluster lives in a process of its own, since this one is connected to another.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

SCRIPT = Path(__file__).with_name("placement_checks.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `placement_checks.py` saw."""
    out = tmp_path_factory.mktemp("placement") / "found.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_a_group_goes_to_the_nodes_with_its_labels(found: dict[str, Any]):
    assert found["labelled"]["rollout"] == ["gpu-a", "gpu-a", "gpu-b", "gpu-b"]
    assert set(found["labelled"]["policy"]) == {"trainer"}


def test_spread_processes_sit_on_a_node_each(found: dict[str, Any]):
    assert len(set(found["spread"]["policy"])) == 3


def test_groups_that_share_see_the_same_gpus_rank_by_rank(found: dict[str, Any]):
    assert found["shared"]["policy"] == found["shared"]["rollout"]
    assert sorted(found["shared"]["policy"]) == [f"gpu-{node} ['{gpu}']" for node in "ab" for gpu in (0, 1)]


def test_ranks_follow_the_nodes(found: dict[str, Any]):
    nodes = found["ranks"]["policy"]
    assert nodes == sorted(nodes, key=nodes.index)
    assert len(set(nodes)) == 3


def test_the_plan_foretells_how_many_processes_each_node_gets(found: dict[str, Any]):
    assert found["foretold"] == found["ranks_per_node"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown label", "no node has the label role=nowhere, and the labels of the nodes are name=gpu-a, "),
        ("too large", "a process needs 5 CPU on one node, and the nodes have at most 4 CPU each; lower policy.cpus"),
        ("too many", "CPU: the run needs 40 (policy 40 x 1) and the cluster has"),
        ("too spread", "placement.spread puts its 9 bundles on a node each"),
        ("busy", "bundles not granted within 3 s (placement.timeout_s). Other work holds what is needed:\nCPU: "),
        ("autoscaling", "bundles not granted within 3 s (placement.timeout_s)"),
    ],
)
def test_what_cannot_be_placed_is_one_error(found: dict[str, Any], case: str, message: str):
    assert message in found["errors"][case]


def test_nothing_stays_reserved_whatever_happened(found: dict[str, Any]):
    assert found["left"] == []
