"""Placement groups: reserving what a plan asks for, with a deadline, and handing it to actors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

    def environment(self, name: str, cpus: float) -> dict[str, str]:
        """Environment of an actor: its threads, its name and where it logs."""
        return {
            **actor_environment(cpus),
            **logging_environment(self.logs, name),
            ACTOR: name,
            LOGS: str(self.logs),
        }

    def options(self, name: str, rank: int) -> dict[str, Any]:
        """Ray actor options for process `rank` of group `name`: its bundle, resources, threads and readable name."""
        bundle = self.order[name][rank]
        resources = self.plan.bundles[bundle]
        cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        group, index = self.seats[bundle]
        return {
            "name": f"{name}-{rank}",
            "num_cpus": cpus,
            "num_gpus": gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index, placement_group_capture_child_tasks=True
            ),
            "runtime_env": {"env_vars": self.environment(f"{name}-{rank}", cpus)},
        }


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
    names = plan.group_of()
    held: list[PlacementGroup] = []
    try:
        seats: dict[int, tuple[PlacementGroup, int]] = {}
        for strategy, bundles in plan.parts():
            group = placement_group(
                [plan.bundles[index] for index in bundles],
                strategy=strategy,
                bundle_label_selector=[plan.labels.get(names[index], {}) for index in bundles],
            )
            held.append(group)
            seats |= {bundle: (group, place) for place, bundle in enumerate(bundles)}
        _await(held, plan)
        tables = {group.id: placement_group_table(group)["bundles_to_node_id"] for group in held}
        node_of = [str(tables[seats[index][0].id][seats[index][1]]) for index in range(len(plan.bundles))]
        order = {
            name: sorted(bundles, key=lambda index: (node_of[index], index)) for name, bundles in plan.groups.items()
        }
        yield Placement(plan, [seats[index] for index in range(len(plan.bundles))], order, logs)
    finally:
        for group in held:
            remove_placement_group(group)


def inventory() -> list[Node]:
    """The living nodes of the cluster that this process is connected to."""
    return [node_from_ray(entry) for entry in ray.nodes() if entry["Alive"]]


def _await(held: list[PlacementGroup], plan: Plan) -> None:
    """Wait until all groups are granted."""
    try:
        ray.get([group.ready() for group in held], timeout=plan.timeout_s)
    except GetTimeoutError:
        busy = shortfalls(plan, ray.available_resources())
        raise ResourceError(
            f"placement: {len(plan.bundles)} bundles not granted within {plan.timeout_s:g} s (placement.timeout_s). "
            + (
                "Other work holds what is needed:\n" + "\n".join(busy)
                if busy
                else "Other work holds the nodes that they fit on"
            )
        ) from None
