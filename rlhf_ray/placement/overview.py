"""What a run will look like on an inventory, before anything is taken: seats, memory, and what does not fit. Pure."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.load import changed
from rlhf_ray.config.pipeline import PipelineConfig, StageConfig, stage_name
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.sections import ModelSection
from rlhf_ray.errors import ConfigError
from rlhf_ray.names import model_folder
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.layout import Layout, crowding, lay_out, misfits
from rlhf_ray.placement.memory import GIB, Estimate, Shapes, cache_bytes_per_token, estimate
from rlhf_ray.placement.plan import RESOURCE_KEYS, Plan, make_plan, shortfalls
from rlhf_ray.placement.shapes import ModelShape, find_shape, shape_from_scratch

# What is on one GPU: groups, and how many processes of each.
Contents = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Overview:
    """One stage on an inventory.

    Attributes:
        stage: its name.
        plan: bundles by group.
        layout: node and GPUs of every process.
        estimates: peak memory of each process, by group; groups of unknown models are absent.
        contents: what is on each GPU that is used, by node and GPU index.
        problems: why the run would not start or would run out of memory, each with what to change.
        notes: what could not be checked.
    """

    stage: str
    plan: Plan
    layout: Layout
    estimates: dict[str, Estimate]
    contents: dict[tuple[int, int], Contents]
    problems: list[str]
    notes: list[str]


def overviews(config: StageConfig | PipelineConfig, nodes: list[Node]) -> list[Overview]:
    """The overview of a stage, or of every stage of a pipeline."""
    if not isinstance(config, PipelineConfig):
        return [overview(config, nodes)]
    left: dict[str, ModelShape] = {}  # models that stages before leave
    outputs: dict[str, str] = {}
    found = []

    def shapes(name: str) -> ModelShape | None:
        return left.get(name) or find_shape(name)

    for name in config.stages:
        stage = config.stage_config(name, outputs)
        found.append(overview(stage, nodes, shapes))
        shape = _trained_shape(stage, shapes)
        folder = str(model_folder(stage.run.dir))
        if shape is not None:
            left[folder] = shape
        outputs[name] = folder
    return found


def _trained_shape(config: StageConfig, shapes: Shapes) -> ModelShape | None:
    if isinstance(config, PPOConfig):
        return shapes(config.policy.path)
    model = config.model
    if isinstance(model, ModelSection) and model.scratch is not None:
        return shape_from_scratch(model.scratch)
    return shapes(model.path or "")


def overview(config: StageConfig, nodes: list[Node], shapes: Shapes = find_shape) -> Overview:
    """One stage on an inventory."""
    plan = make_plan(config)
    layout = lay_out(plan, nodes)
    contents = _contents(layout)
    gpu_memory = _smallest_gpu(nodes)
    estimates = estimate(config, gpu_memory, shapes)
    problems = shortfalls(plan, _totals(nodes)) or misfits(plan, nodes) or crowding(plan, layout)
    problems += _over_gpu_memory(config, nodes, contents, estimates, shapes)
    problems += _over_main_memory(config, plan, layout, nodes, estimates)
    problems += _too_little_cache(config, estimates, shapes)
    unknown = [name for name in plan.groups if name not in estimates]
    notes = [f"{name}: its memory is not known, since the model's shape or the GPU's memory is not" for name in unknown]
    return Overview(stage_name(config), plan, layout, estimates, contents, problems, notes)


def _totals(nodes: list[Node]) -> dict[str, float]:
    return {name: sum(node.amounts[name] for node in nodes) for name in RESOURCE_KEYS}


def _smallest_gpu(nodes: list[Node]) -> float | None:
    known = [node.gpu_memory_gib for node in nodes if node.gpus]
    return min((size for size in known if size is not None), default=None)


def _contents(layout: Layout) -> dict[tuple[int, int], Contents]:
    counts: dict[tuple[int, int], Counter[str]] = {}
    for seat in layout.seats:
        for gpu in seat.gpus:
            counts.setdefault((seat.node, gpu), Counter())[seat.group] += 1
    return {place: tuple(sorted(groups.items())) for place, groups in sorted(counts.items())}


def on_gpu(contents: Contents, estimates: Mapping[str, Estimate]) -> float:
    """Estimated bytes on a GPU with these contents, at the turn that takes most."""

    def during(turn_of_engines: bool) -> float:
        total = 0.0
        for group, count in contents:
            if group in estimates:
                one = estimates[group]
                works = one.at_rest is None or (group == "rollout") == turn_of_engines
                total += (one.total if works else one.at_rest or 0.0) * count
        return total

    return max(during(True), during(False))


def _over_gpu_memory(
    config: StageConfig,
    nodes: list[Node],
    contents: dict[tuple[int, int], Contents],
    estimates: dict[str, Estimate],
    shapes: Shapes,
) -> list[str]:
    """GPUs whose processes do not fit, one sentence for each mix of processes."""
    found = {}
    for (index, gpu), mix in contents.items():
        memory = nodes[index].gpu_memory_gib
        if memory is None or mix in found or on_gpu(mix, estimates) <= memory * GIB:
            continue
        parts = ", ".join(f"{group} {_largest(estimates[group])}" for group, _ in mix if group in estimates)
        change = nearest_change(config, nodes, mix, memory, shapes)
        found[mix] = (
            f"GPU {gpu} of {nodes[index].name}: {on_gpu(mix, estimates) / GIB:.1f} GiB needed of {memory:g} ({parts}); "
            + (change or "no such change makes it fit; use larger GPUs, or more of them with fewer groups on each")
        )
    return list(found.values())


def _largest(estimate: Estimate) -> str:
    name, size = max(estimate.parts.items(), key=lambda part: part[1])
    return f"{estimate.total / GIB:.1f}, most of it {name} {size / GIB:.1f}"


def nearest_change(
    config: StageConfig, nodes: list[Node], mix: Contents, gpu_memory_gib: float, shapes: Shapes
) -> str | None:
    """The first change of the configuration, in the order of what it costs, with which this mix fits a GPU.

    A change that does not help by itself is kept while the next ones are tried, so the answer may name several.
    """
    candidates = [change for group, _ in mix for change in _changes(config, group)]

    def fits(overrides: list[str]) -> bool:
        try:
            other = changed(config, overrides)
        except ConfigError:
            return False
        plan, estimates = make_plan(other), estimate(other, gpu_memory_gib, shapes)
        if on_gpu(mix, estimates) > gpu_memory_gib * GIB:
            return False
        if shortfalls(plan, _totals(nodes)) or misfits(plan, nodes):
            return False
        return not _over_main_memory(other, plan, lay_out(plan, nodes), nodes, estimates)

    for change in candidates:
        if fits(list(change)):
            return "set " + ", ".join(change)
    together: dict[str, str] = {}
    for change in candidates:
        together |= {override.partition("=")[0]: override for override in change}
        if fits(list(together.values())):
            return "set " + ", ".join(together.values())
    return None


def _changes(config: StageConfig, group: str) -> Iterator[tuple[str, ...]]:
    """Changes that save memory in a group, cheapest first; each is one override or several that go together."""
    training = config.training
    if group in ("policy", "critic", "group"):
        if not training.gradient_checkpointing:
            yield ("training.gradient_checkpointing=true",)
        yield from _halved("training.micro_batch_tokens", training.micro_batch_tokens, _longest(config))
        processes = _processes(config, group)
        if processes > 1:
            yield from ((f"training.zero_stage={stage}",) for stage in range(training.zero_stage + 1, 4))
        if not training.offload_optimizer:
            yield ("training.offload_optimizer=true",)
        if not config.placement.partners(group):  # those that share are as many as their partners
            yield from ((f"{group}.processes={processes * factor}",) for factor in (2, 4, 8))
    elif isinstance(config, PPOConfig) and group == "rollout":
        share = round(config.rollout.gpu_memory_utilization, 2)
        while share > 0.15:
            share = round(share - 0.05, 2)
            yield (f"rollout.gpu_memory_utilization={share:g}",)
        if not config.placement.partners(group):
            for factor in (2, 4, 8):
                split = f"rollout.tensor_parallel={config.rollout.tensor_parallel * factor}"
                yield (split,)
                yield split, f"rollout.nodes_per_engine={config.rollout.nodes_per_engine * factor}"
    elif isinstance(config, PPOConfig):
        section = config.reference if group == "reference" else config.reward
        yield from _halved(f"{group}.micro_batch_tokens", section.micro_batch_tokens, _longest(config))


def _halved(key: str, tokens: int, longest: int) -> Iterator[tuple[str, ...]]:
    while tokens // 2 >= longest:
        tokens //= 2
        yield (f"{key}={tokens}",)


def _longest(config: StageConfig) -> int:
    """Tokens of the longest sequence of training."""
    extra = config.rollout.max_new_tokens if isinstance(config, PPOConfig) else 0
    return config.data.max_tokens + extra


def _processes(config: StageConfig, group: str) -> int:
    return int(getattr(config, group).processes)


def _over_main_memory(
    config: StageConfig, plan: Plan, layout: Layout, nodes: list[Node], estimates: Mapping[str, Estimate]
) -> list[str]:
    """Nodes whose main memory is too small for CPU processes and offloaded states, a sentence for each such mix."""
    counts: dict[int, Counter[str]] = {}
    for seat in layout.seats:
        if seat.group in estimates and estimates[seat.group].in_main_memory:
            counts.setdefault(seat.node, Counter())[seat.group] += _estimated_in(config, seat.group)
    found: dict[Any, str] = {}
    for index, groups in counts.items():
        node = nodes[index]
        needed = {group: estimates[group].in_main_memory * count for group, count in groups.items()}
        if node.memory_gib is None or sum(needed.values()) <= node.memory_gib * GIB:
            continue
        parts = ", ".join(f"{group} {size / GIB:.1f}" for group, size in needed.items())
        change = "lower training.micro_batch_tokens or processes"
        if any(estimates[group].at_rest is not None for group in groups):
            change = "take trainers out of placement.share, where their optimizers go to main memory"
        elif any(estimates[group].offloaded for group in groups):
            change = "set training.offload_optimizer=false"
        found[tuple(sorted(groups.items()))] = (
            f"main memory of {node.name}: {sum(needed.values()) / GIB:.1f} GiB needed of {node.memory_gib:.1f} "
            f"({parts}); {change}, or use a larger node"
        )
    return list(found.values())


def _estimated_in(config: StageConfig, group: str) -> int:
    """How many of what is estimated sit in one bundle: an engine's estimate is that of a tensor-parallel rank."""
    if not isinstance(config, PPOConfig) or group != "rollout":
        return 1
    return config.rollout.tensor_parallel // config.rollout.nodes_per_engine


def _too_little_cache(config: StageConfig, estimates: Mapping[str, Estimate], shapes: Shapes) -> list[str]:
    """An engine whose cache cannot hold a single sequence does not start."""
    if not isinstance(config, PPOConfig) or "rollout" not in estimates:
        return []
    shape = shapes(config.policy.path)
    if shape is None:
        return []
    cache = estimates["rollout"].parts["KV cache"]
    needed = cache_bytes_per_token(config, shape) * _longest(config)
    if cache >= needed:
        return []
    key = "rollout.kv_cache_gib" if config.rollout.kv_cache_gib else "rollout.gpu_memory_utilization"
    return [
        f"rollout: {cache / GIB:.2f} GiB are left for the KV cache and one sequence of {_longest(config)} tokens needs "
        f"{needed / GIB:.2f}; raise {key} or rollout.tensor_parallel"
    ]
