"""What a run asks of the cluster, and whether it fits: a pure function of the configuration."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlhf_ray.config.pipeline import StageConfig
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.sections import PlacementSection, ProcessesSection

# Ray's names of the two resources, with the configuration key of a process's share of each.
RESOURCE_KEYS = {"CPU": "cpus", "GPU": "gpus"}
# Shares that are suggested in place of larger ones.
GPU_PARTS = (0.5, 0.25, 0.2, 0.1)
CPU_STEP = 0.05


@dataclass(frozen=True)
class GroupDemand:
    """What one group of processes asks for.

    Attributes:
        name: the group's section of the configuration.
        processes: how many (rollout: engines).
        cpus: CPU cores of each, on each of its nodes.
        gpus: GPUs of each, on each of its nodes (rollout: of all tensor-parallel ranks there).
        nodes: over how many nodes each is split.
    """

    name: str
    processes: int
    cpus: float
    gpus: float
    nodes: int = 1


@dataclass(frozen=True)
class Plan:
    """What is reserved for a run.

    Attributes:
        bundles: resources of each bundle, as Ray takes them; one bundle holds one process, or one of each group that
            shares it, or a node's part of an engine that is split.
        groups: the bundles of each group, in rank order; those of one process follow each other.
        labels: node labels that a group's bundles need, by group.
        spread: groups of which every process goes to a node of its own.
        timeout_s: longest wait for the cluster to grant all of it.
        autoscaling: whether nodes may still come, so that too few are no error.
        portions: what a process takes of a bundle that several groups share; other groups take theirs whole.
        split: bundles of one process, for groups whose processes take more than one.
        later: processes beyond these that join as nodes have room, by group (`rollout.min_engines`).
        cores: numbers of the cores of its node that each process of a group runs on; others run on all.
    """

    bundles: list[dict[str, float]]
    groups: dict[str, list[int]]
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    spread: tuple[str, ...] = ()
    timeout_s: float = 120.0
    autoscaling: bool = False
    portions: dict[str, dict[str, float]] = field(default_factory=dict)
    split: dict[str, int] = field(default_factory=dict)
    later: dict[str, int] = field(default_factory=dict)
    cores: dict[str, list[int]] = field(default_factory=dict)

    @property
    def waiting(self) -> str:
        """What a run does where nodes are missing that may still come, in words."""
        limit = f"{self.timeout_s:g} s (placement.timeout_s)"
        return f"a run waits up to {limit} for an autoscaler to add nodes, and fails without"

    def processes(self, group: str) -> int:
        """How many processes a group has (rollout: engines)."""
        return len(self.groups[group]) // self.split.get(group, 1)

    def parts(self) -> list[tuple[str, list[int]]]:
        """Ray's placement groups: strategy and bundles of each.

        Each group that is spread is one of its own; all other bundles are in one that packs them on few nodes. They
        are to be granted in this order: what is packed finds room around what is spread, and not the other way round.
        """
        packed = [index for name, bundles in self.groups.items() if name not in self.spread for index in bundles]
        parts = [("STRICT_SPREAD", self.groups[name]) for name in self.groups if name in self.spread]
        return parts + ([("PACK", list(dict.fromkeys(packed)))] if packed else [])

    def groups_of(self) -> list[tuple[str, ...]]:
        """The groups that have a process in each bundle: one, or those that share it."""
        names: list[tuple[str, ...]] = [()] * len(self.bundles)
        for name, bundles in self.groups.items():
            for index in bundles:
                names[index] += (name,)
        return names

    def labels_of(self, groups: tuple[str, ...]) -> dict[str, str]:
        """The node labels that a bundle of these groups needs."""
        return {label: value for name in groups for label, value in self.labels.get(name, {}).items()}

    def takes(self, group: str) -> dict[str, float]:
        """What each process of a group asks, by resource; one that is split asks it on each of its nodes."""
        return self.portions.get(group) or self.bundles[self.groups[group][0]]

    def needed(self, resource: str) -> float:
        """All that the plan asks of a resource."""
        return sum(bundle.get(resource, 0.0) for bundle in self.bundles)

    def share(self, group: str, resource: str) -> float:
        """What each process of a group asks of a resource, on all of its nodes."""
        return self.takes(group).get(resource, 0.0) * self.split.get(group, 1)


def demands(config: StageConfig) -> list[GroupDemand]:
    """What each group of a stage asks for, in the order in which groups are placed."""
    if not isinstance(config, PPOConfig):
        return [_demand("group", config.group)]
    rollout = config.rollout
    engines, nodes = rollout.min_engines or rollout.engines, rollout.nodes_per_engine
    return [
        _demand("policy", config.policy),
        GroupDemand("rollout", engines, rollout.cpus, rollout.gpus * rollout.tensor_parallel / nodes, nodes),
        _demand("reference", config.reference),
        _demand("reward", config.reward),
        _demand("critic", config.critic),
    ]


def _demand(name: str, section: ProcessesSection) -> GroupDemand:
    return GroupDemand(name, section.processes, section.cpus, section.gpus)


def make_plan(config: StageConfig) -> Plan:
    """The plan of a stage."""
    plan = plan_of(demands(config), config.placement)
    later = config.rollout.engines - plan.processes("rollout") if isinstance(config, PPOConfig) else 0
    return replace(plan, later={"rollout": later}) if later else plan


def count_key(group: str, *, joining: bool = False) -> str:
    """The configuration key of a group's number of processes, that of the engines to start with where others join."""
    if group != "rollout":
        return f"{group}.processes"
    return "rollout.min_engines" if joining else "rollout.engines"


def plan_of(asked: Sequence[GroupDemand], placement: PlacementSection) -> Plan:
    """One bundle per process and node, groups one after the other; rank i of groups that share is in one bundle."""
    bundles: list[dict[str, float]] = []
    groups: dict[str, list[int]] = {}
    portions: dict[str, dict[str, float]] = {}
    for demand in asked:
        taken = {name: amount for name, amount in (("CPU", demand.cpus), ("GPU", demand.gpus)) if amount}
        partners = placement.partners(demand.name)
        if partners:
            portions[demand.name] = taken
        held = next((groups[name] for name in partners if name in groups), None)
        if held is None:
            count = demand.processes * demand.nodes
            groups[demand.name] = list(range(len(bundles), len(bundles) + count))
            bundles += [dict(taken) for _ in range(count)]
            continue
        groups[demand.name] = held
        for index in held:
            for name, amount in taken.items():
                bundles[index][name] = round(bundles[index].get(name, 0.0) + amount, 6)
    return Plan(
        bundles,
        groups,
        placement.labels,
        tuple(placement.spread),
        placement.timeout_s,
        placement.autoscaling,
        portions,
        split={demand.name: demand.nodes for demand in asked if demand.nodes > 1},
        cores=placement.cores,
    )


@dataclass(frozen=True)
class Lack:
    """A resource of which the cluster has too little as a whole.

    Attributes:
        resource: `CPU` or `GPU`.
        amount: how much more the plan needs.
        words: what it needs, who takes it, and what there is.
    """

    resource: str
    amount: float
    words: str


def lacks(plan: Plan, available: Mapping[str, float]) -> list[Lack]:
    """What the cluster lacks for a plan.

    Only totals are compared: whether every bundle fits one node is `layout.misfits`.

    Args:
        plan: the plan.
        available: amounts of `CPU` and `GPU` that the cluster has.
    """
    found = []
    for resource in RESOURCE_KEYS:
        needed, has = plan.needed(resource), available.get(resource, 0.0)
        lacking = round(needed - has, 6)
        if lacking > 0:
            uses = ", ".join(
                f"{group} {plan.processes(group)} x {plan.share(group, resource):g}"
                for group in plan.groups
                if plan.share(group, resource)
            )
            words = f"{resource}: the run needs {needed:g} ({uses}) and the cluster has {has:g}"
            found.append(Lack(resource, lacking, words))
    return found


def shortfalls(plan: Plan, available: Mapping[str, float]) -> list[str]:
    """What the cluster lacks for a plan, in words, each with the smallest change after which the totals would do.

    Args:
        plan: the plan.
        available: amounts of `CPU` and `GPU` that the cluster has.
    """
    found = []
    for lack in lacks(plan, available):
        changes = [
            _one_change(plan, lack.resource, lack.amount)
            or _change_of_all(plan, lack.resource, available.get(lack.resource, 0.0)),
            f"add {lack.amount:g} {lack.resource}",
        ]
        found.append(f"{lack.words}; " + ", or ".join(change for change in changes if change))
    return found


def _one_change(plan: Plan, resource: str, lacking: float) -> str | None:
    """The change of one key that frees what is lacking and as little more as can be, if there is one."""
    changes: list[tuple[float, str]] = []
    for group in plan.groups:
        processes, share = plan.processes(group), plan.share(group, resource)
        # Groups that share have equal numbers of processes, so that none of them can have fewer by itself.
        fewer = processes - math.ceil(round(lacking / share, 6)) if share and group not in plan.portions else 0
        if fewer >= 1:
            key = count_key(group, joining=group in plan.later)
            changes.append(((processes - fewer) * share, f"lower {key} from {processes} to {fewer}"))
        # Processes of different groups can share one GPU; ranks of one group cannot, for NCCL refuses it, nor
        # can a split engine do with a fraction.
        if resource == "CPU" or (processes == 1 and share <= 1):
            nodes = plan.split.get(group, 1)
            smaller = smaller_share(resource, (share - lacking / processes) / nodes)
            if smaller > 0:
                change = f"lower {group}.{RESOURCE_KEYS[resource]} from {share / nodes:g} to {smaller:g}"
                changes.append(((share - smaller * nodes) * processes, change))
    return min(changes)[1] if changes else None


def _change_of_all(plan: Plan, resource: str, has: float) -> str | None:
    """The change of several groups that fits in what the cluster has, if there is one."""
    shares = {group: plan.share(group, resource) for group in plan.groups if plan.share(group, resource)}
    key = RESOURCE_KEYS[resource]
    if resource == "GPU" and has == 0:
        cache = " with a cache of rollout.kv_cache_gib, such as 0.5" if "rollout" in shares else ""
        return f"set {', '.join(f'{group}.{key}' for group in shares)} to 0 to run on CPU{cache}"
    factor = has / plan.needed(resource)
    nodes = {group: plan.split.get(group, 1) for group in shares}
    smaller = {group: smaller_share(resource, share * factor / nodes[group]) for group, share in shares.items()}
    if resource == "CPU" and min(smaller.values()) > 0:
        return "lower " + ", ".join(f"{group}.{key} to {share:g}" for group, share in smaller.items())
    return "lower the processes of several groups" if sum(shares.values()) <= has else None


def smaller_share(resource: str, limit: float) -> float:
    """The largest share up to `limit` that makes sense: a GPU is cut into equal parts."""
    if resource == "GPU":
        return max((part for part in GPU_PARTS if part <= limit + 1e-6), default=0.0)
    return round(math.floor(round(limit / CPU_STEP, 6)) * CPU_STEP, 6)


def describe(plan: Plan) -> str:
    """The plan as a table for people."""
    rows = [["group", "processes", "CPU each", "GPU each", "CPU", "GPU"]]
    for group in plan.groups:
        processes, shares = plan.processes(group), [plan.share(group, resource) for resource in RESOURCE_KEYS]
        totals = [share * processes for share in shares]
        rows.append([group, str(processes), *(f"{amount:g}" for amount in shares + totals)])
    totals = [plan.needed(resource) for resource in RESOURCE_KEYS]
    rows.append(["total", str(sum(map(plan.processes, plan.groups))), "", "", *(f"{amount:g}" for amount in totals)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )
