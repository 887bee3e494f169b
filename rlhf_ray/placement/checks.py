"""Whether a configuration fits an inventory: seats, memory of GPUs and nodes, room for the cache. Pure."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlhf_ray.config.pipeline import StageConfig
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.layout import ROUNDING, Layout, crowding, find_misfits, labelled_nodes, lay_out
from rlhf_ray.placement.memory import GIB, Estimate, Shapes, cache_bytes_per_token, estimate
from rlhf_ray.placement.plan import RESOURCE_KEYS, GroupDemand, Plan, demands, lacks, make_plan
from rlhf_ray.placement.shapes import ModelShape

# What is on one GPU: groups, and how many processes of each.
Contents = tuple[tuple[str, int], ...]
# What a finding is about, equal in two configurations where the same does not fit.
About = tuple[str | float | tuple[str, ...], ...]

# Kinds of findings that nodes which come later may end; the others are of processes that have a seat.
OF_SEATS = ("lack", "label", "size", "spread", "room")

# Bundles that are seated at most in trying changes, so that a plan for 1,000 GPUs is there in a second or two.
MOST_BUNDLES = 150_000


@dataclass(frozen=True)
class Finding:
    """Something that does not fit.

    Attributes:
        kind: `lack` of a resource as a whole; `label`, `size` of a process or `spread` that the nodes do not have;
            no `room` beside others; memory of a `GPU` or of a `node`; too little `cache`.
        groups: the groups that it is about.
        words: what is needed and what there is.
        amount: what is needed, bytes, or how much of the resource, or how many bundles, is lacking.
        of: the resource, or the memory of each GPU in GiB, that it is about.
        remedy: what to change besides the configuration, in words, where that can be said at once.
    """

    kind: str
    groups: tuple[str, ...]
    words: str
    amount: float
    of: str | float = ""
    remedy: str = ""

    @property
    def about(self) -> About:
        """What it shares with the same finding in another configuration."""
        return self.kind, self.of, () if self.kind == "lack" else self.groups


@dataclass(frozen=True)
class State:
    """One configuration on an inventory.

    Attributes:
        contents: what is on each GPU that is used, by node and GPU index.
        estimates: of every group; engines as on the smallest of the GPUs on which they sit.
        by_memory: the same for every size of GPU that is used, since engines take a share of it.
    """

    plan: Plan
    layout: Layout
    contents: dict[tuple[int, int], Contents]
    estimates: dict[str, Estimate]
    by_memory: dict[float | None, dict[str, Estimate]]
    findings: list[Finding]


@dataclass(frozen=True)
class _Seated:
    """A plan on the nodes, and what follows from its seats alone."""

    plan: Plan
    layout: Layout
    contents: dict[tuple[int, int], Contents]
    mixes: dict[tuple[Contents, float | None], tuple[int, int]]  # each different one, with the first such GPU
    findings: list[Finding]


class Examiner:
    """Examines configurations of one stage on one inventory, and remembers what several of them have in common."""

    def __init__(self, nodes: list[Node], shapes: Shapes) -> None:
        self.nodes = nodes
        self.totals = {name: sum(node.amounts[name] for node in nodes) for name in RESOURCE_KEYS}
        self.original_shapes = shapes
        self._shapes: dict[str, ModelShape | None] = {}
        self._laid_out = 0
        self._seated: dict[tuple[tuple[GroupDemand, ...], str], _Seated] = {}

    def shapes(self, name: str) -> ModelShape | None:
        """A model's shape, looked up once."""
        if name not in self._shapes:
            self._shapes[name] = self.original_shapes(name)
        return self._shapes[name]

    def examine(self, config: StageConfig, allowed: Mapping[About, float] | None = None) -> State | None:
        """The state of a configuration.

        Args:
            config: a stage.
            allowed: what may not fit, and by how much at most (`Finding.amount`); None allows everything.

        Returns:
            None as soon as anything else does not fit.
        """
        seated = self._seats(config, allowed)
        if seated is None:
            return None
        smallest = _engine_memory(seated.plan, seated.layout, self.nodes)
        by_memory = {
            memory: estimate(config, memory, self.shapes) for memory in {smallest, *(size for _, size in seated.mixes)}
        }
        estimates = by_memory[smallest]
        findings = list(seated.findings)
        for more in (
            _gpu_memory(seated, self.nodes, by_memory),
            _main_memory(config, seated.layout, self.nodes, estimates),
            _cache(config, estimates, self.shapes),
        ):
            for finding in more:
                if not _is_allowed(finding, allowed):
                    return None
                findings.append(finding)
        return State(seated.plan, seated.layout, seated.contents, estimates, by_memory, findings)

    def _seats(self, config: StageConfig, allowed: Mapping[About, float] | None) -> _Seated | None:
        key = (tuple(demands(config)), config.placement.model_dump_json())
        if key not in self._seated:
            plan = make_plan(config)
            findings = list(_shortages(plan, self.nodes, self.totals))
            if not all(_is_allowed(finding, allowed) for finding in findings):
                return None  # before the seats, which take longest
            if allowed is not None and self._laid_out > MOST_BUNDLES:
                return None
            self._laid_out += len(plan.bundles)
            layout = lay_out(plan, self.nodes)
            if not findings:
                findings = [
                    Finding("room", (group,), words, layout.without[group])
                    for group, words in crowding(plan, layout).items()
                ]
            contents = _contents(layout)
            mixes: dict[tuple[Contents, float | None], tuple[int, int]] = {}
            for place, mix in contents.items():
                mixes.setdefault((mix, self.nodes[place[0]].gpu_memory_gib), place)
            self._seated[key] = _Seated(plan, layout, contents, mixes, findings)
        seated = self._seated[key]
        return seated if all(_is_allowed(finding, allowed) for finding in seated.findings) else None


def _is_allowed(finding: Finding, allowed: Mapping[About, float] | None) -> bool:
    return allowed is None or finding.amount <= allowed.get(finding.about, -1.0) * (1 + ROUNDING)


def on_gpu(contents: Contents, estimates: Mapping[str, Estimate]) -> float:
    """Estimated bytes on a GPU with these contents, at the turn that takes most."""
    return sum(parts_on_gpu(contents, estimates).values())


def parts_on_gpu(contents: Contents, estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """The same by part; what those keep whose turn it is not is one part, `at rest`."""

    def during(turn_of_engines: bool) -> dict[str, float]:
        total: dict[str, float] = {}
        for group, count in contents:
            if group in estimates:
                one = estimates[group]
                works = one.at_rest is None or (group == "rollout") == turn_of_engines
                for part, size in (one.parts if works else {"at rest": one.at_rest or 0.0}).items():
                    total[part] = total.get(part, 0.0) + size * count
        return total

    return max(during(True), during(False), key=lambda parts: sum(parts.values()))


def longest_sequence(config: StageConfig) -> int:
    """Tokens of the longest sequence of training."""
    extra = config.rollout.max_new_tokens if isinstance(config, PPOConfig) else 0
    return config.data.max_tokens + extra


def _shortages(plan: Plan, nodes: list[Node], totals: Mapping[str, float]) -> Iterator[Finding]:
    """What is lacking whatever sits where."""
    for lack in lacks(plan, totals):
        takers = tuple(group for group in plan.groups if plan.share(group, lack.resource))
        add = f"add at least {lack.amount:g} {lack.resource}"
        yield Finding("lack", takers, lack.words, lack.amount, of=lack.resource, remedy=add)
    for misfit in find_misfits(plan, nodes):
        if misfit.resource and not totals[misfit.resource]:
            continue  # that there is none at all is said above
        label = "label nodes" if misfit.kind == "label" else ""
        yield Finding(misfit.kind, misfit.groups, misfit.words, float(misfit.bundles), remedy=label)


def _engine_memory(plan: Plan, layout: Layout, nodes: list[Node]) -> float | None:
    """Memory of the smallest GPU on which an engine sits, or could sit where none found a seat."""
    seats = [nodes[seat.node] for seat in layout.seats if seat.group == "rollout" and seat.gpus]
    if not seats and "rollout" in plan.groups:
        labels = plan.labels_of(plan.groups_of()[plan.groups["rollout"][0]])
        seats = [node for node in labelled_nodes(nodes, labels) if node.gpus] or [node for node in nodes if node.gpus]
    return min((node.gpu_memory_gib for node in seats if node.gpu_memory_gib is not None), default=None)


def _contents(layout: Layout) -> dict[tuple[int, int], Contents]:
    counts: dict[tuple[int, int], Counter[str]] = {}
    for seat in layout.seats:
        for gpu in seat.gpus:
            counts.setdefault((seat.node, gpu), Counter())[seat.group] += 1
    return {place: tuple(sorted(groups.items())) for place, groups in sorted(counts.items())}


def _gpu_memory(
    seated: _Seated, nodes: list[Node], by_memory: Mapping[float | None, Mapping[str, Estimate]]
) -> Iterator[Finding]:
    """GPUs whose processes do not fit, one finding for each mix of processes."""
    for (mix, memory), (index, gpu) in seated.mixes.items():
        if memory is None:
            continue
        estimates = by_memory[memory]
        needed = on_gpu(mix, estimates)
        if needed <= memory * GIB:
            continue
        parts = ", ".join(f"{group} {_largest(estimates[group])}" for group, _ in mix if group in estimates)
        words = f"GPU {gpu} of {nodes[index].name}: {needed / GIB:.1f} GiB needed of {memory:g} ({parts})"
        yield Finding("GPU", tuple(group for group, _ in mix), words, needed, of=memory)


def _largest(one: Estimate) -> str:
    name, size = max(one.parts.items(), key=lambda part: part[1])
    return f"{one.total / GIB:.1f}, most of it {name} {size / GIB:.1f}"


def _main_memory(
    config: StageConfig, layout: Layout, nodes: list[Node], estimates: Mapping[str, Estimate]
) -> Iterator[Finding]:
    """Nodes whose main memory is too small for CPU processes and offloaded states, one finding for each such mix."""
    counts: dict[int, Counter[str]] = {}
    for seat in layout.seats:
        if seat.group in estimates and estimates[seat.group].in_main_memory:
            counts.setdefault(seat.node, Counter())[seat.group] += _estimated_in(config, seat.group)
    seen: set[tuple[float | None, tuple[tuple[str, int], ...]]] = set()
    for index, groups in counts.items():
        node, mix = nodes[index], tuple(sorted(groups.items()))
        if node.memory_gib is None or (node.memory_gib, mix) in seen:
            continue
        seen.add((node.memory_gib, mix))
        sizes = {group: estimates[group].in_main_memory * count for group, count in groups.items()}
        needed = sum(sizes.values())
        if needed > node.memory_gib * GIB:
            parts = ", ".join(f"{group} {size / GIB:.1f}" for group, size in sizes.items())
            words = f"main memory of {node.name}: {needed / GIB:.1f} GiB needed of {node.memory_gib:.1f} ({parts})"
            yield Finding("node", tuple(sorted(groups)), words, needed, of=node.memory_gib)


def _estimated_in(config: StageConfig, group: str) -> int:
    """How many of what is estimated sit in one bundle: an engine's estimate is that of a tensor-parallel rank."""
    if not isinstance(config, PPOConfig) or group != "rollout":
        return 1
    return config.rollout.tensor_parallel // config.rollout.nodes_per_engine


def _cache(config: StageConfig, estimates: Mapping[str, Estimate], shapes: Shapes) -> Iterator[Finding]:
    """An engine whose cache cannot hold a single sequence does not start."""
    if not isinstance(config, PPOConfig) or "rollout" not in estimates:
        return
    needed = bytes_of_a_sequence(config, shapes)
    cache = estimates["rollout"].parts["KV cache"]
    if cache < needed:
        yield Finding(
            "cache",
            ("rollout",),
            f"rollout: {cache / GIB:.2f} GiB are left for the KV cache and one sequence of {longest_sequence(config)} "
            f"tokens needs {needed / GIB:.2f}",
            needed,
        )


def bytes_of_a_sequence(config: PPOConfig, shapes: Shapes) -> float:
    """Key-value cache of the longest sequence on one tensor-parallel rank; 0 where the model is not known."""
    shape = shapes(config.policy.path)
    return 0.0 if shape is None else cache_bytes_per_token(config, shape) * longest_sequence(config)
