"""Which process goes to which node and GPU: what Ray is expected to do with a plan. A pure function.

Ray places bundles that need GPUs first and larger ones before smaller ones; it takes the node that would keep most
of its resources free and puts on it whatever else fits, then goes to the next (PACK); or one bundle a node
(STRICT_SPREAD). Nodes that are equal to Ray are taken here in the inventory's order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

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

    def __init__(self, index: int, node: Node, asked: set[str]) -> None:
        self.index = index
        self.labels = {name: value for name, value in node.labels.items() if name in asked}
        self.left = node.amounts
        self.gpus = [1.0] * node.gpus

    @property
    def look(self) -> tuple[Any, ...]:
        """Equal for nodes that hold the same."""
        return tuple(sorted(self.labels.items())), tuple(self.left.values()), tuple(self.gpus)

    def seats_for(self, bundle: Mapping[str, float]) -> tuple[int, ...] | None:
        """The GPUs that a bundle would get here; None where it does not fit."""
        for name, amount in bundle.items():
            if self.left.get(name, 0.0) + ROUNDING < amount:
                return None
        amount = bundle.get("GPU", 0.0)
        if amount == 0:
            return ()
        if amount < 1:  # the first that has a fraction left, the fullest before others
            room = [gpu for gpu, left in enumerate(self.gpus) if left + ROUNDING >= amount]
            return (min(room, key=lambda gpu: self.gpus[gpu]),) if room else None
        whole = [gpu for gpu, left in enumerate(self.gpus) if left + ROUNDING >= 1]
        return tuple(whole[: round(amount)]) if len(whole) >= round(amount) else None

    def score(self, bundle: Mapping[str, float]) -> float:
        """Ray's: the sum over resources of the share that would stay free; the highest is taken."""
        return sum((self.left[name] - amount) / self.left[name] for name, amount in bundle.items() if self.left[name])

    def take(self, bundle: Mapping[str, float], seats: tuple[int, ...]) -> None:
        for gpu in seats:
            self.gpus[gpu] -= min(bundle["GPU"], 1.0)
        for name, wanted in bundle.items():
            self.left[name] -= wanted


def lay_out(plan: Plan, nodes: list[Node]) -> Layout:
    """Seat every process of the plan, as far as there is room."""
    of_bundles = plan.groups_of()
    labels_of = {groups: plan.labels_of(groups) for groups in set(of_bundles)}
    wanted = [labels_of[groups] for groups in of_bundles]
    asked = {name for labels in labels_of.values() for name in labels}
    free = [_Free(index, node, asked) for index, node in enumerate(nodes)]
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
    # Nodes that look alike, the first of them last; clusters have many, and only the first needs a look.
    candidates: dict[tuple[Any, ...], list[_Free]] = {}
    for node in reversed(free):
        candidates.setdefault(node.look, []).append(node)

    def kind(index: int) -> tuple[dict[str, float], dict[str, str]]:
        return plan.bundles[index], wanted[index]

    # Neighbours that are alike are taken together: where one of them has no room, neither have the others.
    waiting = [list(alike) for _, alike in groupby(order, key=kind)]

    def seats_in(node: _Free, index: int) -> tuple[int, ...] | None:
        for name, value in wanted[index].items():
            if node.labels.get(name) != value:
                return None
        return node.seats_for(plan.bundles[index])

    while waiting:
        first = waiting[0][0]
        able = [
            (look, alike[-1]) for look, alike in candidates.items() if alike and seats_in(alike[-1], first) is not None
        ]
        if not able:
            waiting.pop(0)
            continue
        look, best = max(able, key=lambda pair: (pair[1].score(plan.bundles[first]), -pair[1].index))
        candidates[look].pop()
        for several in waiting[:1] if alone else waiting:
            while several and (seats := seats_in(best, several[0])) is not None:
                index = several.pop(0)
                best.take(plan.bundles[index], seats)
                placed[index] = (best.index, seats)
                if alone:
                    break
        waiting = [several for several in waiting if several]
    return placed


@dataclass(frozen=True)
class Misfit:
    """A group that the nodes cannot hold whatever else runs.

    Attributes:
        kind: what is in the way: a label that no node has, the size of one process, or too few nodes to spread over.
        groups: the group, or all that share its bundles.
        words: what is asked and what there is.
        remedy: what to change, in words.
        bundles: how many find no node, where they are spread.
        resource: of which no node has enough for one process.
    """

    kind: Literal["label", "size", "spread"]
    groups: tuple[str, ...]
    words: str
    remedy: str
    bundles: int = 0
    resource: str = ""


def misfits(plan: Plan, nodes: list[Node]) -> list[str]:
    """Groups that the nodes cannot hold whatever else runs, in words: labels, size of one process, spreading.

    What the cluster lacks as a whole is `plan.shortfalls`.
    """
    return [f"{misfit.words}; {misfit.remedy}" for misfit in find_misfits(plan, nodes)]


def find_misfits(plan: Plan, nodes: list[Node]) -> list[Misfit]:
    """The same with what is in the way; groups that share are one."""
    of_bundles = plan.groups_of()
    found = [
        misfit
        for group, bundles in plan.groups.items()
        if (misfit := _misfit(plan, group, of_bundles[bundles[0]], nodes))
    ]
    return list(dict.fromkeys(found))


def labelled_nodes(nodes: list[Node], labels: Mapping[str, str]) -> list[Node]:
    """The nodes with all of these labels."""
    return [node for node in nodes if all(node.labels.get(name) == value for name, value in labels.items())]


def _misfit(plan: Plan, group: str, groups: tuple[str, ...], nodes: list[Node]) -> Misfit | None:
    bundle, count = plan.bundles[plan.groups[group][0]], len(plan.groups[group])
    labels, who = plan.labels_of(groups), " with ".join(groups)
    said = ", ".join(f"{name}={value}" for name, value in labels.items())
    labelled = labelled_nodes(nodes, labels)
    if not labelled:
        # Ray's own labels, such as a node's identity, are nobody's choice.
        given = {pair for node in nodes for pair in node.labels.items() if not pair[0].startswith("ray.io/")}
        known = [f"{name}={value}" for name, value in sorted(given)]
        return Misfit(
            "label",
            groups,
            f"{who}: no node has the label {said}, and the labels of the nodes are {', '.join(known) or 'none'}",
            f"change placement.labels.{next(name for name in groups if plan.labels.get(name))}, or label nodes",
        )
    where = f"nodes with {said}" if labels else "nodes"
    able = [n for n in labelled if all(n.amounts.get(name, 0.0) + ROUNDING >= a for name, a in bundle.items())]
    if not able:
        largest = {name: max(n.amounts.get(name, 0.0) for n in labelled) for name in bundle}
        short = "GPU" if largest.get("GPU", 0.0) + ROUNDING < bundle.get("GPU", 0.0) else "CPU"
        most = max(groups, key=lambda name: plan.share(name, short))
        key = f"{most}.{RESOURCE_KEYS[short]}"
        if (most, short) == ("rollout", "GPU"):
            key = "rollout.tensor_parallel, or raise rollout.nodes_per_engine"
        what = "a process" if len(groups) == 1 else "a process of each"
        return Misfit(
            "size",
            groups,
            f"{who}: {what} needs {amounts_in_words(bundle)} on one node, and the {where} have at most "
            f"{amounts_in_words(largest)} each",
            f"lower {key}",
            resource=short,
        )
    if group in plan.spread and count > len(able):
        return Misfit(
            "spread",
            groups,
            f"{group}: placement.spread puts its {count} bundles on a node each, and {len(able)} {where} can hold one",
            "lower its number of processes, or take it out of placement.spread",
            count - len(able),
        )
    return None


def amounts_in_words(amounts: Mapping[str, float]) -> str:
    """`2 CPU and 1 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def crowding(plan: Plan, layout: Layout) -> dict[str, str]:
    """Groups of which some bundles found no seat beside the others, each in words."""
    return {
        group: f"{group}: {count} of {len(plan.groups[group])} bundles find no room beside the other groups"
        for group, count in layout.without.items()
    }
