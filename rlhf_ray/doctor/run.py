"""The examination: probes on every node, led from here. Every wait has a deadline and says which node and check."""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.doctor import network, probe
from rlhf_ray.doctor.needs import Needs
from rlhf_ray.doctor.network import Peers, gather, ring
from rlhf_ray.doctor.probe import Facts
from rlhf_ray.doctor.verdicts import (
    Exchange,
    Line,
    Node,
    judge_driver,
    judge_gpu_drivers,
    judge_network,
    judge_node,
    judge_placement,
)
from rlhf_ray.placement.groups import inventory
from rlhf_ray.runtime import interface, ports
from rlhf_ray.runtime.cluster import actor_environment, connection

START_TIMEOUT_S = 60.0
# The probe's checks have a deadline of their own; this one is for a node that does not even say so.
REPORT_TIMEOUT_S = probe.CHECK_TIMEOUT_S + 10.0
CLOCK_TIMEOUT_S = 5.0
CLOCK_ROUND_TRIPS = 5
PAIR_TIMEOUT_S = 15.0
TOGETHER_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Examination:
    """What was found: the lines, and what they were made of, by node."""

    lines: list[Line]
    facts: dict[str, Any]


def examine(address: str | None, needs: Needs | None, say: Callable[[str], None]) -> Examination:
    """Look at every node of a cluster.

    Args:
        address: of the cluster; None takes that of the configuration, `RAY_ADDRESS`, or starts Ray here.
        needs: those of a configuration, where one is to be looked at.
        say: is told what is being done.

    Raises:
        ResourceError: no cluster answers at the address, it refuses this user, or it runs another version of Ray or
            Python.
    """
    asked = "--address" if address else "run.ray_address"
    with ExitStack() as stack:
        stack.enter_context(connection(address or (needs.ray_address if needs else None), asked))
        known = dict(_named([node for node in ray.nodes() if node["Alive"]]))
        say(f"examining {len(known)} node{'s' * (len(known) != 1)}")
        for module in (probe, network, interface, ports):
            cloudpickle.register_pickle_by_value(module)
            stack.callback(cloudpickle.unregister_pickle_by_value, module)
        driver, reports = _probe(known, needs)
        nodes = [Node(name, node["Resources"], reports[name]) for name, node in known.items()]
        lines = judge_driver(driver)
        share = needs.gpu_share if needs else None
        lines += [line for node in nodes for line in judge_node(node, driver["versions"], share)]
        lines += judge_gpu_drivers(nodes, used=needs is None or needs.gpus)
        if needs:
            held, places = ray.available_resources(), inventory()
            lines += [line for stage in needs.plans.items() for line in judge_placement(*stage, held, places)]
        answering = [node for node in nodes if "probe" not in node.report]
        say("measuring the network")
        tested, meetings = _network(answering, known, needs)
        return Examination(
            lines + tested,
            {
                "driver": driver,
                "nodes": {node.name: {"resources": node.resources, **node.report} for node in nodes},
                "network": [vars(meeting) for meeting in meetings],
            },
        )


def _named(nodes: list[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Nodes by address, with the beginning of their ids where several have the same one."""
    addresses = [node["NodeManagerAddress"] for node in nodes]
    for node, address in sorted(zip(nodes, addresses, strict=True), key=lambda pair: pair[1]):
        yield address if addresses.count(address) == 1 else f"{address}/{node['NodeID'][:6]}", node


def _actor(kind: type, node: Mapping[str, Any]) -> Any:
    """An actor on a node, in the environment that a run's actors have. It takes no CPU, so a busy node answers too."""
    return (
        ray.remote(kind)
        .options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            runtime_env={"env_vars": actor_environment(1)},
        )
        .remote()
    )


def _probe(known: Mapping[str, Mapping[str, Any]], needs: Needs | None) -> tuple[Facts, dict[str, Facts]]:
    """The driver's own facts, and the report of every node."""
    checks: dict[str, Callable[[], Any]] = {"versions": probe.versions}
    if needs and needs.wandb:
        checks["tracker"] = _tracker
    driver = probe.attempt(checks, probe.CHECK_TIMEOUT_S)
    with ExitStack() as stack:
        token: Facts = {}
        if needs:
            token = driver["run directory"] = stack.enter_context(_token(needs.run_dir))
        probes = {name: _actor(probe.NodeProbe, node) for name, node in known.items()}
        for actor in probes.values():
            stack.callback(ray.kill, actor)
        started = gather({name: actor.clock.remote() for name, actor in probes.items()}, "starting", START_TIMEOUT_S)
        alive = {name: probes[name] for name, answer in started.items() if "now" in answer}
        ask = {
            name: actor.report.remote(
                str(Path(known[name]["RayletSocketName"]).parents[2]),
                needs.models if needs else {},
                token.get("path"),
                token.get("name"),
            )
            for name, actor in alive.items()
        }
        found = gather(ask, "reporting", REPORT_TIMEOUT_S)
        clocks = {name: _clock(name, alive[name]) for name, report in found.items() if "error" not in report}
    reports: dict[str, Facts] = {}
    for name in known:
        report = found.get(name) or started[name]
        reports[name] = {"probe": report} if "error" in report else {**report, "clock": clocks[name]}
    return driver, reports


@contextmanager
def _token(run_dir: Path) -> Iterator[Facts]:
    """A small file where the run directory is or would be, by which nodes know the folder; removed after the block."""

    def write() -> Facts:
        folder = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
        name = f".rlhf_ray_doctor_{uuid.uuid4().hex}"
        Path(folder, name).touch()
        return {"path": str(folder), "name": name}

    def remove() -> Facts:
        Path(token["path"], token["name"]).unlink()
        return {}

    token = probe.attempt({"run directory": write}, probe.CHECK_TIMEOUT_S)["run directory"]
    try:
        yield token
    finally:
        if "name" in token:
            probe.attempt({"run directory": remove}, probe.CHECK_TIMEOUT_S)


def _tracker() -> Facts:
    """Where W&B is asked, and whether it would answer."""
    import wandb

    url = wandb.setup().settings.base_url
    return {"url": url, "key": bool(os.environ.get("WANDB_API_KEY")), "refused": probe.unreachable(url)}


def _clock(name: str, actor: Any) -> Facts:
    """The clock of a node less that of the driver, from the quickest of several round trips."""
    best: tuple[float, float] | None = None
    for _ in range(CLOCK_ROUND_TRIPS):
        asked = time.time()
        answer = gather({name: actor.clock.remote()}, "clock", CLOCK_TIMEOUT_S)[name]
        answered = time.time()
        if "error" in answer:
            return answer
        # The node looked at its clock somewhere between the two times.
        uncertainty = (answered - asked) / 2
        if best is None or uncertainty < best[0]:
            best = uncertainty, answer["now"] - (asked + answered) / 2
    assert best is not None
    return {"offset_s": best[1], "uncertainty_s": best[0]}


def _network(
    nodes: list[Node], known: Mapping[str, Mapping[str, Any]], needs: Needs | None
) -> tuple[list[Line], list[Exchange]]:
    """Neighbours pair by pair, then all together where every pair has met: the lines, and what was measured."""
    with_gpus = [node.name for node in nodes if node.resources.get("GPU")]
    backend = "nccl" if with_gpus and (needs is None or needs.gpus) else "gloo"
    names = with_gpus if backend == "nccl" else [node.name for node in nodes]
    if len(names) < 2:
        return [Line("network", "cluster", "ok", f"{len(names)} node for {backend}: nothing between nodes")], []
    addresses = {name: known[name]["NodeManagerAddress"] for name in names}
    pairs: list[Exchange] = []
    together = None
    with Peers(addresses, lambda name: _actor(network.Peer, known[name]), backend) as peers:
        for edges in ring(len(names)):
            pairs += peers.exchange([(names[first], names[second]) for first, second in edges], PAIR_TIMEOUT_S)
        if not any(pair.failed for pair in pairs):
            (together,) = peers.exchange([tuple(names)], TOGETHER_TIMEOUT_S)
    return judge_network(backend, pairs, together), [*pairs, *([together] if together else [])]
