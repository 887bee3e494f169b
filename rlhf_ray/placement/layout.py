"""Which process goes to which node and GPU: what Ray is expected to do with a plan. A pure function.

Ray places bundles that need GPUs first and larger ones before smaller ones; it takes the node that would keep most
of its resources free and puts on it whatever else fits, then goes to the next (PACK); or one bundle a node
(STRICT_SPREAD). Nodes that are equal to Ray are taken here in the inventory's order.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.plan import RESOURCE_KEYS, Plan

ROUNDING = 1e-6


@dataclass(frozen=True)
class Seat:
    """Where one process sits.

    Attributes:
        rank: its number in the group; ranks follow the nodes.
        part: which of its nodes this is, where it is split.
        node: index into the inventory.
        gpus: the node's GPUs that it takes or shares.
    """

    group: str
    rank: int
    part: int
    node: int
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A plan on an inventory.

    Attributes:
        seats: of every bundle that found one, in the order of the plan's groups.
        without: bundles of each group that found none.
    """

    seats: list[Seat]
    without: dict[str, int]


class _Free:
    """What is left of one node."""

    def __init__(self, index: int, node: Node) -> None:
        self.index = index
        self.labels = node.labels
        self.left = node.amounts
        self.gpus = [1.0] * node.gpus

    def holds(self, bundle: Mapping[str, float]) -> bool:
        if any(self.left.get(name, 0.0) + ROUNDING < amount for name, amount in bundle.items()):
            return False
        return self._seats(bundle.get("GPU", 0.0)) is not None

    def score(self, bundle: Mapping[str, float]) -> float:
        """Ray's: the sum over resources of the share that would stay free; the highest is taken."""
        return sum((self.left[name] - amount) / self.left[name] for name, amount in bundle.items() if self.left[name])

    def take(self, bundle: Mapping[str, float]) -> tuple[int, ...]:
        amount = bundle.get("GPU", 0.0)
        seats = self._seats(amount) or ()
        for gpu in seats:
            self.gpus[gpu] -= min(amount, 1.0)
        for name, wanted in bundle.items():
            self.left[name] -= wanted
        return seats

    def _seats(self, amount: float) -> tuple[int, ...] | None:
        """The GPUs for an amount: whole ones, or the first that has a fraction left, the fullest before others."""
        if amount == 0:
            return ()
        if amount < 1:
            room = [gpu for gpu, left in enumerate(self.gpus) if left + ROUNDING >= amount]
            return (min(room, key=lambda gpu: self.gpus[gpu]),) if room else None
        whole = [gpu for gpu, left in enumerate(self.gpus) if left + ROUNDING >= 1]
        return tuple(whole[: round(amount)]) if len(whole) >= round(amount) else None


def lay_out(plan: Plan, nodes: list[Node]) -> Layout:
    """Seat every process of the plan, as far as there is room."""
    free = [_Free(index, node) for index, node in enumerate(nodes)]
    wanted = [plan.labels_of(groups) for groups in plan.groups_of()]
    placed: dict[int, tuple[int, tuple[int, ...]]] = {}
    for strategy, bundles in plan.parts():
        order = sorted(bundles, key=lambda i: (-plan.bundles[i].get("GPU", 0.0), -plan.bundles[i].get("CPU", 0.0)))
        placed |= _pack(plan, order, free, wanted, alone=strategy == "STRICT_SPREAD")
    seats, without = [], {}
    for group, bundles in plan.groups.items():
        found = sorted((placed[index] for index in bundles if index in placed), key=lambda seat: seat)
        nodes_each = plan.split.get(group, 1)
        seats += [Seat(group, *divmod(index, nodes_each), node, gpus) for index, (node, gpus) in enumerate(found)]
        if len(found) < len(bundles):
            without[group] = len(bundles) - len(found)
    return Layout(seats, without)


def _pack(
    plan: Plan,
    order: list[int],
    free: list[_Free],
    wanted: list[dict[str, str]],
    *,
    alone: bool,
) -> dict[int, tuple[int, tuple[int, ...]]]:
    """Node and GPUs of each bundle in `order`, as far as they fit; `alone` puts at most one on a node."""
    placed: dict[int, tuple[int, tuple[int, ...]]] = {}
    candidates, waiting = list(free), list(order)

    def fits(node: _Free, index: int) -> bool:
        labelled = all(node.labels.get(name) == value for name, value in wanted[index].items())
        return labelled and node.holds(plan.bundles[index])

    while waiting:
        first = waiting[0]
        able = [node for node in candidates if fits(node, first)]
        if not able:
            waiting.pop(0)
            continue
        best = max(able, key=lambda node: node.score(plan.bundles[first]))
        for index in waiting if not alone else [first]:
            if fits(best, index):
                placed[index] = (best.index, best.take(plan.bundles[index]))
        waiting = [index for index in waiting if index not in placed]
        candidates.remove(best)
    return placed


def misfits(plan: Plan, nodes: list[Node]) -> list[str]:
    """Groups that the nodes cannot hold whatever else runs, in words: labels, size of one process, spreading.

    What the cluster lacks as a whole is `plan.shortfalls`.
    """
    found = [words for group in plan.groups if (words := _misfit(plan, group, nodes))]
    return list(dict.fromkeys(found))  # groups that share say the same


def _misfit(plan: Plan, group: str, nodes: list[Node]) -> str | None:
    first, count = plan.groups[group][0], len(plan.groups[group])
    bundle, groups = plan.bundles[first], plan.groups_of()[first]
    labels, who = plan.labels_of(groups), " with ".join(groups)
    said = ", ".join(f"{name}={value}" for name, value in labels.items())
    labelled = [n for n in nodes if all(n.labels.get(name) == value for name, value in labels.items())]
    if not labelled:
        # Ray's own labels, such as a node's identity, are nobody's choice.
        given = {pair for node in nodes for pair in node.labels.items() if not pair[0].startswith("ray.io/")}
        known = [f"{name}={value}" for name, value in sorted(given)]
        return (
            f"{who}: no node has the label {said}, and the labels of the nodes are {', '.join(known) or 'none'}; "
            f"change placement.labels.{next(name for name in groups if plan.labels.get(name))}, or label nodes"
        )
    where = f"nodes with {said}" if labels else "nodes"
    able = [n for n in labelled if all(n.amounts.get(name, 0.0) + ROUNDING >= a for name, a in bundle.items())]
    if not able:
        needs = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        largest = {name: max(n.amounts.get(name, 0.0) for n in labelled) for name in bundle}
        has = " and ".join(f"{amount:g} {name}" for name, amount in largest.items())
        short = "GPU" if largest.get("GPU", 0.0) + ROUNDING < bundle.get("GPU", 0.0) else "CPU"
        most = max(groups, key=lambda name: plan.share(name, short))
        key = f"{most}.{RESOURCE_KEYS[short]}"
        if (most, short) == ("rollout", "GPU"):
            key = "rollout.tensor_parallel, or raise rollout.nodes_per_engine"
        what = "a process" if len(groups) == 1 else "a process of each"
        return f"{who}: {what} needs {needs} on one node, and the {where} have at most {has} each; lower {key}"
    if group in plan.spread and count > len(able):
        return (
            f"{group}: placement.spread puts its {count} bundles on a node each, and {len(able)} {where} can hold "
            "one; lower its number of processes, or take it out of placement.spread"
        )
    return None


def crowding(plan: Plan, layout: Layout) -> list[str]:
    """Groups of which some bundles found no seat beside the others, in words."""
    return [
        f"{group}: {count} of {len(plan.groups[group])} bundles find no room beside the other groups; lower the "
        "number of processes or what each takes, or add a node"
        for group, count in layout.without.items()
    ]
