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
        (
            "autoscaling",
            "within 3 s (placement.timeout_s). The cluster is too small, whatever runs on it, and no node came in that "
            "time:\nCPU: the run needs 41 (policy 40 x 1, rollout 1 x 1) and the cluster has 8; ",
        ),
        (
            "autoscaling",
            "\npolicy: required 40 x 1 CPU; available 8 of 8 CPU free (at most 4 on one node), with room for 8 of 40\n"
            "rollout: required 1 x 1 CPU; available 8 of 8 CPU free (at most 4 on one node), with room for 1 of 1",
        ),
        (
            "crowded",
            "(placement.timeout_s). Its nodes do not hold all of them at once, whatever runs on them:\npolicy: 1 of 2 "
            "bundles find no room beside the other groups\npolicy: required 2 x 3 CPU; available 8 of 8 CPU free (at "
            "most 4 on one node), with room for 1 of 2",
        ),
        (
            "busy",
            "(placement.timeout_s). Other work holds what is needed; wait for it, or ask for less:\n"
            "policy: required 5 x 1 CPU; available 4 of 8 CPU free (at most 2 on one node), with room for 4 of 5",
        ),
        (
            "busy label",
            "Other work holds what is needed; wait for it, or ask for less:\n"
            "policy: required 2 x 1 CPU on nodes with role=trainer; available 4 of 4 CPU free (at most 4 on one node), "
            "with room for 2 of 2\n"
            "rollout: required 3 x 1 CPU on nodes with role=rollout; available 2.5 of 4 CPU free (at most 2 on one "
            "node), with room for 2 of 3",
        ),
        (
            "busy spread",
            "rollout: required 3 x 1 CPU on a node each; available 6.5 of 8 CPU free (at most 4 on one node), with "
            "room for 2 of 3",
        ),
    ],
)
def test_what_cannot_be_placed_is_one_error(found: dict[str, Any], case: str, message: str):
    assert message in found["errors"][case]


def test_engines_that_join_a_group_that_is_spread_get_a_node_each(found: dict[str, Any]):
    joined = found["joined"]
    assert sorted(joined["there"]) == ["gpu-a", "gpu-b", "trainer"]
    assert joined["first"] == ["new-0", "new-0"]
    assert joined["doubled"] == [False, False, False, True, True]
    assert joined["second"] == "new-1"
    assert joined["doubled at last"] == [False] * 5


def test_bundles_of_an_engine_that_joined_are_given_back_when_it_leaves(found: dict[str, Any]):
    """Those of the plan and of ranks 2 to 4 are left."""
    assert found["joined"]["after release"] == 4


def test_nothing_stays_reserved_whatever_happened(found: dict[str, Any]):
    assert found["left"] == []
