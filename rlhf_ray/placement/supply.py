"""What each group requires and what its nodes have left, in words. A pure function."""

import math
from collections.abc import Mapping, Sequence

from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.layout import ROUNDING, amounts_in_words
from rlhf_ray.placement.plan import Plan


def supply(plan: Plan, nodes: Sequence[tuple[Node, Mapping[str, float]]]) -> list[str]:
    """A line for each group, or for all that share bundles: required against available on the nodes with its labels.

    Args:
        plan: the plan.
        nodes: each node with what of it is free.
    """
    lines = {}
    of_bundles = plan.groups_of()
    for group, bundles in plan.groups.items():
        groups = of_bundles[bundles[0]]
        if groups not in lines:
            lines[groups] = _line(plan, group, groups, nodes)
    return list(lines.values())


def _line(plan: Plan, group: str, groups: tuple[str, ...], nodes: Sequence[tuple[Node, Mapping[str, float]]]) -> str:
    bundle, count = plan.bundles[plan.groups[group][0]], len(plan.groups[group])
    labels = plan.labels_of(groups)
    labelled = [(n, free) for n, free in nodes if all(n.labels.get(key) == value for key, value in labels.items())]
    said = ", ".join(f"{key}={value}" for key, value in labels.items())
    where = f" on nodes with {said}" if labels else ""
    each = " on a node each" if group in plan.spread else ""
    required = f"{' with '.join(groups)}: required {count} x {amounts_in_words(bundle)}{each}{where}"
    if not labelled:
        return f"{required}; no such node"
    amounts = []
    for name in bundle:
        free = [left.get(name, 0.0) for _, left in labelled]
        total = sum(node.amounts.get(name, 0.0) for node, _ in labelled)
        amounts.append(f"{sum(free):g} of {total:g} {name} free (at most {max(free):g} on one node)")
    room = sum(_room(bundle, left, alone=group in plan.spread) for _, left in labelled)
    return f"{required}; available {' and '.join(amounts)}, with room for {min(room, count)} of {count}"


def _room(bundle: Mapping[str, float], left: Mapping[str, float], *, alone: bool) -> int:
    """How many such bundles a node could take if nobody else came."""
    found = min(math.floor((left.get(name, 0.0) + ROUNDING) / amount) for name, amount in bundle.items() if amount)
    return min(found, 1) if alone else found
