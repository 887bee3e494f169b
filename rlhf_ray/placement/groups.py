"""Placement groups: reserving what a plan asks for, with a deadline, and handing it to actors."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.errors import ResourceError
from rlhf_ray.placement.inventory import Node, node_from_ray
from rlhf_ray.placement.layout import crowding, lay_out, misfits
from rlhf_ray.placement.plan import Plan, shortfalls
from rlhf_ray.placement.supply import supply
from rlhf_ray.runtime.cluster import actor_environment
from rlhf_ray.runtime.cores import cores_environment
from rlhf_ray.tracking.logs import ACTOR, LOGS, logging_environment

logger = logging.getLogger(__name__)


NODE_ID = "ray.io/node-id"
# How long a process that joins a group that is spread is waited for, so that the next one knows its node.
GRANT_S = 5.0


class _Joining:
    """Placement groups of processes beyond the plan.

    A process of a group that is spread gets a node that none of the group's others has. Ray knows nothing of that
    between placement groups: nodes that are taken are excluded by their identity. Two that wait for nodes to come may
    both be granted the first one (`doubled`).
    """

    def __init__(self, plan: Plan, nodes: dict[str, set[str]]) -> None:
        """
        Args:
            plan: the plan.
            nodes: identities of the nodes that the plan's processes have, by group.
        """
        self._plan = plan
        self._nodes = nodes
        self._groups: dict[tuple[str, int], PlacementGroup] = {}

    def bundles(self, name: str, rank: int) -> PlacementGroup:
        """The bundles of a process, like those of its group; they may still have to be granted."""
        key = name, rank
        if key not in self._groups:
            others = [group for (of, _), group in self._groups.items() if of == name]
            self._groups[key] = self._ask(name)
            # Where another one waits, there is no room now.
            if name in self._plan.spread and all(map(_nodes_of, others)):
                self._groups[key].wait(GRANT_S)
        return self._groups[key]

    def _ask(self, name: str) -> PlacementGroup:
        labels, spread = dict(self._plan.labels.get(name, {})), name in self._plan.spread
        if spread and (taken := self._taken(name)):
            labels[NODE_ID] = f"!in({','.join(sorted(taken))})"
        parts = self._plan.split.get(name, 1)
        strategy = "STRICT_SPREAD" if spread else "PACK"
        return placement_group(
            [self._plan.takes(name)] * parts, strategy=strategy, bundle_label_selector=[labels] * parts
        )

    def _taken(self, name: str, but: int | None = None) -> set[str]:
        """Identities of the nodes that processes of a group have, but for one of those beyond the plan."""
        joined = [_nodes_of(group) for (of, rank), group in self._groups.items() if of == name and rank != but]
        return self._nodes[name].union(*joined)

    def doubled(self, name: str, rank: int) -> bool:
        """Whether a process of a group that is spread was granted a node that another of them has."""
        if name not in self._plan.spread or (name, rank) not in self._groups:
            return False
        return not _nodes_of(self._groups[name, rank]).isdisjoint(self._taken(name, but=rank))

    def release(self, name: str, rank: int) -> None:
        """Give back the bundles of a process, if it has any here."""
        if group := self._groups.pop((name, rank), None):
            remove_placement_group(group)

    def close(self) -> None:
        """Give back all bundles."""
        for key in list(self._groups):
            self.release(*key)


def _nodes_of(group: PlacementGroup) -> set[str]:
    """Identities of the nodes that a placement group has, none before it is granted."""
    table = placement_group_table(group)
    return set(map(str, table["bundles_to_node_id"].values())) if table["state"] == "CREATED" else set()


@dataclass(frozen=True)
class Placement:
    """Reserved bundles: which of them each process of each group takes."""

    plan: Plan
    seats: list[tuple[PlacementGroup, int]]  # of each bundle of the plan
    order: dict[str, list[int]]  # group -> bundle of each rank, ranks following nodes
    logs: Path  # folder of the actors' logs
    joining: _Joining  # of processes beyond the plan

    def environment(self, name: str, cpus: float, gpus: float = 0.0, group: str = "") -> dict[str, str]:
        """Environment of an actor: its threads, the cores of its group, its name and where it logs."""
        # Ray shows all GPUs of a node to an actor that asked for none, and DeepSpeed takes what it sees.
        hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
        return {
            **hidden,
            **actor_environment(cpus, gpus),
            **cores_environment(self.plan.cores.get(group, [])),
            **logging_environment(self.logs, name),
            ACTOR: name,
            LOGS: str(self.logs),
        }

    def options(self, name: str, rank: int, part: int = 0) -> dict[str, Any]:
        """Ray actor options for process `rank` of group `name`: its bundle, resources, threads and readable name.

        A rank beyond the plan gets bundles of its own, like those of its group, and a node of its own where the group
        is spread; its actor waits until they are granted.

        Args:
            name: the group.
            rank: of the process.
            part: which of its nodes, where it is split.
        """
        resources = self.plan.takes(name)
        cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        nodes = self.plan.split.get(name, 1)
        if rank < self.plan.processes(name):
            group, index = self.seats[self.order[name][rank * nodes + part]]
        else:
            group, index = self.joining.bundles(name, rank), part
        actor = f"{name}-{rank}" + (f"-part-{part}" if part else "")
        return {
            "name": actor,
            "num_cpus": cpus,
            "num_gpus": gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index, placement_group_capture_child_tasks=True
            ),
            "runtime_env": {"env_vars": self.environment(actor, cpus, gpus, name)},
        }

    def doubled(self, name: str, rank: int) -> bool:
        """Whether a rank beyond the plan got a node that another of its group has, which `placement.spread` excludes.

        It may where two wait for nodes to come; it is to be started again then, after `release`.
        """
        return self.joining.doubled(name, rank)

    def release(self, name: str, rank: int) -> None:
        """Give back the bundles of a rank beyond the plan; those of the plan stay reserved until the run ends.

        Ray's placement groups are given back whole, and the plan's holds other processes, too, which sit together
        because of it. So an engine that leaves frees its node or GPUs for others only if it joined after the start:
        `rollout.min_engines` says how many do not. The bundles that stay are there at once for an engine that comes
        back.
        """
        self.joining.release(name, rank)


@contextmanager
def reserve(plan: Plan, logs: Path) -> Iterator[Placement]:
    """Hold the plan's bundles inside the block; they are free again after it, however it ends.

    Args:
        plan: what to reserve.
        logs: where the actors log.

    Raises:
        ResourceError: the cluster is too small, or did not grant the bundles in time; says what is missing.
    """
    lacking = shortfalls(plan, ray.cluster_resources()) or misfits(plan, inventory())
    if lacking and not plan.autoscaling:
        raise ResourceError("the cluster is too small for this configuration:\n" + "\n".join(lacking))
    groups = plan.groups_of()
    held: list[PlacementGroup] = []
    try:
        seats: dict[int, tuple[PlacementGroup, int]] = {}
        deadline = time.monotonic() + plan.timeout_s
        for strategy, bundles in plan.parts():
            group = placement_group(
                [plan.bundles[index] for index in bundles],
                strategy=strategy,
                bundle_label_selector=[plan.labels_of(groups[index]) for index in bundles],
            )
            held.append(group)
            # One after the other: asked for together, the packed could take a node that the spread need.
            _await(group, plan, deadline, held[:-1])
            seats |= {bundle: (group, place) for place, bundle in enumerate(bundles)}
        tables = {group.id: placement_group_table(group)["bundles_to_node_id"] for group in held}
        node_of = [str(tables[seats[index][0].id][seats[index][1]]) for index in range(len(plan.bundles))]
        order = {
            name: sorted(bundles, key=lambda index: (node_of[index], index)) for name, bundles in plan.groups.items()
        }
        nodes = {name: {node_of[index] for index in bundles} for name, bundles in plan.groups.items()}
        joining = _Joining(plan, nodes)
        try:
            yield Placement(plan, [seats[index] for index in range(len(plan.bundles))], order, logs, joining)
        finally:
            joining.close()
    finally:
        for group in held:
            remove_placement_group(group)


def inventory() -> list[Node]:
    """The living nodes of the cluster that this process is connected to."""
    return [node_from_ray(entry) for entry in ray.nodes() if entry["Alive"]]


def _await(group: PlacementGroup, plan: Plan, deadline: float, held: list[PlacementGroup]) -> None:
    """Wait until the group is granted; those in `held` are the plan's own and granted already."""
    try:
        ray.get(group.ready(), timeout=max(0.0, deadline - time.monotonic()))
    except GetTimeoutError:
        raise ResourceError(
            f"placement: {len(plan.bundles)} bundles not granted within {plan.timeout_s:g} s (placement.timeout_s). "
            + "\n".join(_reasons(plan, held))
        ) from None


def _reasons(plan: Plan, held: list[PlacementGroup]) -> list[str]:
    """Why a plan was not granted: the cluster as it is, or the work of others; then each group's share, in numbers."""
    entries = [entry for entry in ray.nodes() if entry["Alive"]]
    nodes = [node_from_ray(entry) for entry in entries]
    left = {node: Counter(amounts) for node, amounts in available_resources_per_node().items()}
    for group in held:
        table = placement_group_table(group)
        for index, node in table["bundles_to_node_id"].items():
            left.setdefault(str(node), Counter()).update(table["bundles"][index])
    lines = supply(plan, [(node, left.get(entry["NodeID"], {})) for node, entry in zip(nodes, entries, strict=True)])
    came = ", and no node came in that time" if plan.autoscaling else ""
    if lacking := shortfalls(plan, ray.cluster_resources()) or misfits(plan, nodes):
        return [f"The cluster is too small, whatever runs on it{came}:", *lacking, *lines]
    if crowded := crowding(plan, lay_out(plan, nodes)):
        return [f"Its nodes do not hold all of them at once, whatever runs on them{came}:", *crowded.values(), *lines]
    return ["Other work holds what is needed; wait for it, or ask for less:", *lines]
