"""Changes of a configuration that could make it fit, cheapest first, as overrides; whether they do is not asked."""

import json
import math
from collections.abc import Iterable, Iterator

from rlhf_ray.config.pipeline import StageConfig
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.sections import PlacementSection
from rlhf_ray.placement.checks import Finding, bytes_of_a_sequence, longest_sequence
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.memory import GIB, Shapes
from rlhf_ray.placement.plan import GPU_PARTS, Plan, count_key, smaller_share

# Overrides that go together.
Change = tuple[str, ...]

# Sizes of a cache on a CPU, GiB.
CACHES_GIB = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
# What a GPU weighs against a CPU core, where freeing one is compared with freeing the other.
GPU_WEIGHT = 8.0
# Parts to which everything is lowered together.
FACTORS = (0.75, 0.5, 0.25, 0.125, 0.0)


def changes(
    config: StageConfig, plan: Plan, placement: PlacementSection, finding: Finding, nodes: list[Node], shapes: Shapes
) -> list[Change]:
    """What to try against a finding, in this order.

    Args:
        config: the stage.
        plan: its plan.
        placement: where processes may go, with what it says of other stages.
        finding: what does not fit.
        nodes: the inventory.
        shapes: finds a model's shape.
    """
    if finding.kind == "cache" and isinstance(config, PPOConfig):
        found = [*_more_cache(config, shapes), *_elsewhere(config, placement, finding, nodes)]
    elif finding.kind == "GPU":
        found = [change for group in finding.groups for change in _less_memory(config, group)]
        found += [change for group in finding.groups for change in _own_gpu(config, plan, group)]
    elif finding.kind == "node":
        found = [change for group in finding.groups for change in _less_main_memory(config, group, shapes)]
        found += [change for group in finding.groups for change in _apart(config, plan, placement, group)]
        found += [change for group in finding.groups for _, change in _fewer(config, plan, group, 1)]
    else:
        found = _room(config, plan, placement, finding, nodes, shapes)
    return list(dict.fromkeys(found))


def _less_memory(config: StageConfig, group: str) -> Iterator[Change]:
    """Changes that save memory of a GPU in a group."""
    training = config.training
    if group in ("policy", "critic", "group"):
        if not training.gradient_checkpointing:
            yield ("training.gradient_checkpointing=true",)
        yield from _halved("training.micro_batch_tokens", training.micro_batch_tokens, longest_sequence(config))
        if getattr(config, group).processes > 1:
            yield from ((f"training.zero_stage={stage}",) for stage in range(training.zero_stage + 1, 4))
        if not training.offload_optimizer:
            yield ("training.offload_optimizer=true",)
            if training.zero_stage == 0:
                yield "training.offload_optimizer=true", "training.zero_stage=1"
        yield from _more_processes(config, group)
        if training.dtype == "fp32":
            yield ("training.dtype=bf16",)
    elif isinstance(config, PPOConfig) and group == "rollout":
        rollout = config.rollout
        share = round(rollout.gpu_memory_utilization, 2)
        while share > 0.15:
            share = round(share - 0.05, 2)
            yield (f"rollout.gpu_memory_utilization={share:g}",)
        if not config.placement.partners(group):
            for factor in (2, 4, 8):
                split = f"rollout.tensor_parallel={rollout.tensor_parallel * factor}"
                yield (split,)
                yield split, f"rollout.nodes_per_engine={rollout.nodes_per_engine * factor}"
        if rollout.dtype == "fp32":
            yield ("rollout.dtype=bf16",)
    elif isinstance(config, PPOConfig):
        tokens = config.reference.micro_batch_tokens  # both are those of reward models, too
        yield from _halved("reference.micro_batch_tokens", tokens, longest_sequence(config))
        if config.reference.dtype == "fp32":
            yield ("reference.dtype=bf16",)


def _more_processes(config: StageConfig, group: str) -> Iterator[Change]:
    """More ranks, over which ZeRO divides; those that share are as many as their partners."""
    processes = getattr(config, group).processes
    if not config.placement.partners(group):
        yield from ((f"{group}.processes={processes * factor}",) for factor in (2, 4, 8))


def _halved(key: str, tokens: int, longest: int) -> Iterator[Change]:
    while tokens // 2 >= longest:
        tokens //= 2
        yield (f"{key}={tokens}",)


def _less_main_memory(config: StageConfig, group: str, shapes: Shapes) -> Iterator[Change]:
    """Changes that save memory of a node: of processes on CPUs, and what processes on GPUs leave there."""
    training = config.training
    if group in ("policy", "critic", "group"):
        if getattr(config, group).gpus:
            if training.offload_optimizer:
                yield ("training.offload_optimizer=false",)
            yield from _more_processes(config, group)
            return
        yield from (change for change in _less_memory(config, group) if not change[0].startswith("training.off"))
    elif isinstance(config, PPOConfig) and group == "rollout":
        cache, sequence = config.rollout.kv_cache_gib or 0.0, bytes_of_a_sequence(config, shapes) / GIB
        while cache / 2 >= max(sequence, 0.05):
            cache /= 2
            yield (f"rollout.kv_cache_gib={cache:g}",)
    elif isinstance(config, PPOConfig):
        yield from _less_memory(config, group)


def _own_gpu(config: StageConfig, plan: Plan, group: str) -> Iterator[Change]:
    """A whole GPU for each process of a group that takes a part of one beside others."""
    if group not in plan.portions and 0 < getattr(config, group).gpus < 1:
        yield (f"{group}.gpus=1",)


def _apart(config: StageConfig, plan: Plan, placement: PlacementSection, group: str) -> Iterator[Change]:
    """A trainer out of what it shares, where its optimizer goes to main memory; with a whole GPU of its own."""
    if group not in plan.portions or group == "rollout":
        return
    trainers = [name for name in ("policy", "critic") if name in plan.portions]
    for leaving in ([group], trainers):
        sets = [[name for name in together if name not in leaving] for together in placement.share]
        kept = [together for together in sets if len(together) > 1]
        own = [f"{name}.gpus=1" for name in leaving if getattr(config, name).gpus]
        yield _override("placement.share", kept), *own


def _override(key: str, value: object) -> str:
    """An override whose value is a list or a mapping, as YAML in one line."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _more_cache(config: PPOConfig, shapes: Shapes) -> Iterator[Change]:
    rollout = config.rollout
    if rollout.kv_cache_gib is not None:
        needed = math.ceil(bytes_of_a_sequence(config, shapes) / GIB * 20) / 20
        yield (f"rollout.kv_cache_gib={needed:g}",)
    else:
        share = math.floor(rollout.gpu_memory_utilization * 20) / 20
        while share < 0.9:
            share = round(share + 0.05, 2)
            yield (f"rollout.gpu_memory_utilization={share:g}",)
    if rollout.gpus and rollout.dtype == "fp32":
        yield ("rollout.dtype=bf16",)
    if rollout.gpus and not config.placement.partners("rollout"):
        for factor in (2, 4, 8):
            split = f"rollout.tensor_parallel={rollout.tensor_parallel * factor}"
            yield ("rollout.gpus=1", split) if rollout.gpus < 1 else (split,)
            if rollout.gpus == 1:
                yield split, f"rollout.nodes_per_engine={rollout.nodes_per_engine * factor}"
        if rollout.gpus < 1:
            yield ("rollout.gpus=1",)


def _elsewhere(
    config: StageConfig, placement: PlacementSection, finding: Finding, nodes: list[Node]
) -> Iterator[Change]:
    """Other labels for the groups of a finding: values of the same label that nodes have, and then none."""
    labels = {name: dict(wanted) for name, wanted in placement.labels.items()}
    asked = {label for group in finding.groups for label in labels.get(group, {})}
    given = sorted({pair for node in nodes for pair in node.labels.items() if not pair[0].startswith("ray.io/")})
    if finding.kind == "cache":
        asked |= {label for label, _ in given}
    for label, value in given:
        if label in asked:
            changed = {group: {**labels.get(group, {}), label: value} for group in finding.groups}
            yield (_override("placement.labels", {**labels, **changed}),)
    if asked:
        kept = {group: wanted for group, wanted in labels.items() if group not in finding.groups}
        yield (_override("placement.labels", kept),)


def _room(
    config: StageConfig, plan: Plan, placement: PlacementSection, finding: Finding, nodes: list[Node], shapes: Shapes
) -> list[Change]:
    """Fewer and smaller processes, those first that give up least of what is lacking; then all of them together."""
    resource = str(finding.of) if finding.kind == "lack" else None
    units = list({tuple(sorted({group, *config.placement.partners(group)})): group for group in plan.groups}.values())
    found: list[tuple[float, Change]] = []
    for group in units:
        found += _fewer(config, plan, group, _at_least(plan, group, finding), resource)
    for group in plan.groups:
        found += _smaller(config, plan, group, finding, nodes, resource)
    order = [change for _, change in sorted(found, key=lambda pair: pair[0])]
    first: list[Change] = []
    if finding.kind == "label":
        first = list(_elsewhere(config, placement, finding, nodes))
    if not any(node.gpus for node in nodes):
        first += _on_cpu(config, plan)
    last = list(_all_together(config, plan, units))
    if placement.spread:
        without = [name for name in placement.spread if name not in finding.groups]
        last += [(_override("placement.spread", kept),) for kept in (without, []) if kept != placement.spread]
    return [*first, *order, *last]


def _at_least(plan: Plan, group: str, finding: Finding) -> int:
    """By how many processes a group is to be smaller at least, so that others need not be tried."""
    if finding.kind == "lack":
        share = plan.share(group, str(finding.of))
        for name in plan.groups:  # those that share have fewer of all
            if name != group and plan.groups[name] == plan.groups[group]:
                share += plan.share(name, str(finding.of))
        return math.ceil(round(finding.amount / share, 6)) if share else plan.processes(group)
    if finding.kind in ("room", "spread") and group in finding.groups:
        return math.ceil(finding.amount / plan.split.get(group, 1))
    return 1


def _fewer(
    config: StageConfig, plan: Plan, group: str, least: int, resource: str | None = None
) -> list[tuple[float, Change]]:
    """Fewer processes of a group and of those that share with it, with what that frees."""
    names = [group, *config.placement.partners(group)]
    count, found = plan.processes(group), []
    each = sum(_weight(plan, name, resource) for name in names)
    fewer, step = count - least, 1
    while fewer >= 1 and each:
        keys = (count_key(name, joining=name in plan.later) for name in names)
        found.append(((count - fewer) * each, tuple(f"{key}={fewer}" for key in keys)))
        # Steps grow, so that the number of candidates stays small; the last one is a single process.
        fewer, step = (fewer - step if fewer > step else fewer - 1 if fewer == 1 else 1), step * 2
    return found


def _weight(plan: Plan, group: str, resource: str | None) -> float:
    """What each process of a group takes of a resource, or of both where none is named."""
    if resource is not None:
        return plan.share(group, resource)
    return plan.share(group, "CPU") + GPU_WEIGHT * plan.share(group, "GPU")


def _smaller(
    config: StageConfig, plan: Plan, group: str, finding: Finding, nodes: list[Node], resource: str | None
) -> Iterator[tuple[float, Change]]:
    """Smaller processes of a group: less of a core, part of a GPU, fewer GPUs of an engine or GPUs of more nodes."""
    section, parts = getattr(config, group), plan.split.get(group, 1)
    bundles = plan.processes(group) * parts
    if resource != "GPU" and section.cpus:
        limits = {section.cpus * factor for factor in FACTORS if factor}
        if resource == "CPU":
            limits.add(section.cpus - finding.amount / bundles)
        if finding.kind == "size":
            others = sum(getattr(config, name).cpus for name in config.placement.partners(group))
            limits |= {node.cpus - others for node in nodes}
        for cpus in sorted({smaller_share("CPU", limit) for limit in limits if 0 < limit < section.cpus}):
            if cpus > 0:
                yield (section.cpus - cpus) * bundles, (f"{group}.cpus={cpus:g}",)
    if resource == "CPU" or not section.gpus:
        return
    if plan.processes(group) == 1 and plan.share(group, "GPU") <= 1:
        for part in GPU_PARTS:
            if part < section.gpus:
                freed = section.gpus - part
                yield freed if resource else GPU_WEIGHT * freed, (f"{group}.gpus={part:g}",)
    if isinstance(config, PPOConfig) and group == "rollout":
        rollout = config.rollout
        for factor in (2, 4, 8):
            split = rollout.nodes_per_engine * factor
            if rollout.tensor_parallel % split == 0:
                yield 0.0, (f"rollout.nodes_per_engine={split}",)
        size = rollout.tensor_parallel // 2
        while size >= 1:
            freed = (rollout.tensor_parallel - size) * rollout.gpus * plan.processes(group)
            fewer_nodes = f"rollout.nodes_per_engine={math.gcd(size, rollout.nodes_per_engine)}"
            change = (f"rollout.tensor_parallel={size}", *([fewer_nodes] if rollout.nodes_per_engine > 1 else []))
            yield freed if resource else GPU_WEIGHT * freed, change
            size //= 2


def _on_cpu(config: StageConfig, plan: Plan) -> Iterator[Change]:
    """Everything without GPUs; engines then need a cache of a given size."""
    groups = [group for group in plan.groups if getattr(config, group).gpus]
    change = [f"{group}.gpus=0" for group in groups]
    change += [f"{group}.cpus=1" for group in groups if not getattr(config, group).cpus]
    if not groups or "rollout" not in groups or (isinstance(config, PPOConfig) and config.rollout.kv_cache_gib):
        yield tuple(change)
        return
    for size in CACHES_GIB:
        yield *change, f"rollout.kv_cache_gib={size:g}"


def _all_together(config: StageConfig, plan: Plan, units: Iterable[str]) -> Iterator[Change]:
    """All groups with fewer processes, with fewer cores, with both; in the end one process of each."""
    engines_smaller = []
    if isinstance(config, PPOConfig) and config.rollout.tensor_parallel > 1:
        engines_smaller = ["rollout.tensor_parallel=1", "rollout.nodes_per_engine=1"]
    for factor in FACTORS:
        fewer: list[str] = []
        for unit in units:
            for name in (unit, *config.placement.partners(unit)):
                count = max(1, math.floor(plan.processes(name) * factor))
                if count < plan.processes(name):
                    fewer.append(f"{count_key(name, joining=name in plan.later)}={count}")
        sections = {name: getattr(config, name) for name in plan.groups}
        least = {name: smaller_share("CPU", section.cpus * (factor or 0.1)) for name, section in sections.items()}
        cores = [f"{name}.cpus={cpus:g}" for name, cpus in least.items() if 0 < cpus < sections[name].cpus]
        for change in (cores, fewer, fewer + cores, *([fewer + engines_smaller] if engines_smaller else [])):
            if change:
                yield tuple(change)
