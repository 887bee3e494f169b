"""Placement groups: reserving what a plan asks for, with a deadline, and handing it to actors."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
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
from rlhf_ray.placement.layout import misfits
from rlhf_ray.placement.plan import Plan, shortfalls
from rlhf_ray.runtime.cluster import actor_environment
from rlhf_ray.tracking.logs import ACTOR, LOGS, logging_environment

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Reserved bundles: which of them each process of each group takes."""

    plan: Plan
    seats: list[tuple[PlacementGroup, int]]  # of each bundle of the plan
    order: dict[str, list[int]]  # group -> bundle of each rank, ranks following nodes
    logs: Path  # folder of the actors' logs
    extra: dict[tuple[str, int], PlacementGroup] = field(default_factory=dict)  # of processes beyond the plan

    def environment(self, name: str, cpus: float) -> dict[str, str]:
        """Environment of an actor: its threads, its name and where it logs."""
        return {
            **actor_environment(cpus),
            **logging_environment(self.logs, name),
            ACTOR: name,
            LOGS: str(self.logs),
        }

    def options(self, name: str, rank: int, part: int = 0) -> dict[str, Any]:
        """Ray actor options for process `rank` of group `name`: its bundle, resources, threads and readable name.

        A rank beyond the plan gets bundles of its own, like those of its group; its actor waits until they are granted.

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
            if (name, rank) not in self.extra:
                labels = [self.plan.labels.get(name, {})] * nodes
                self.extra[name, rank] = placement_group([resources] * nodes, bundle_label_selector=labels)
            group, index = self.extra[name, rank], part
        actor = f"{name}-{rank}" + (f"-part-{part}" if part else "")
        return {
            "name": actor,
            "num_cpus": cpus,
            "num_gpus": gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index, placement_group_capture_child_tasks=True
            ),
            "runtime_env": {"env_vars": self.environment(actor, cpus)},
        }

    def release(self, name: str, rank: int) -> None:
        """Give back the bundles of a rank beyond the plan; those of the plan stay reserved."""
        if (name, rank) in self.extra:
            remove_placement_group(self.extra.pop((name, rank)))


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
            _await(group, plan, deadline, granted=list(seats))
            seats |= {bundle: (group, place) for place, bundle in enumerate(bundles)}
        tables = {group.id: placement_group_table(group)["bundles_to_node_id"] for group in held}
        node_of = [str(tables[seats[index][0].id][seats[index][1]]) for index in range(len(plan.bundles))]
        order = {
            name: sorted(bundles, key=lambda index: (node_of[index], index)) for name, bundles in plan.groups.items()
        }
        placement = Placement(plan, [seats[index] for index in range(len(plan.bundles))], order, logs)
        try:
            yield placement
        finally:
            held += placement.extra.values()
    finally:
        for group in held:
            remove_placement_group(group)


def inventory() -> list[Node]:
    """The living nodes of the cluster that this process is connected to."""
    return [node_from_ray(entry) for entry in ray.nodes() if entry["Alive"]]


def _await(group: PlacementGroup, plan: Plan, deadline: float, granted: list[int]) -> None:
    """Wait until the group is granted; the bundles in `granted` are held already."""
    try:
        ray.get(group.ready(), timeout=max(0.0, deadline - time.monotonic()))
    except GetTimeoutError:
        free = Counter(ray.available_resources())
        for index in granted:
            free.update(plan.bundles[index])
        busy = shortfalls(plan, free)
        raise ResourceError(
            f"placement: {len(plan.bundles)} bundles not granted within {plan.timeout_s:g} s (placement.timeout_s). "
            + (
                "Other work holds what is needed:\n" + "\n".join(busy)
                if busy
                else "Other work holds the nodes that they fit on"
            )
        ) from None
