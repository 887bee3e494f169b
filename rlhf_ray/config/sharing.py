"""Checks of `placement.share`: which groups can sit together on a GPU and work in turns."""

from collections import Counter
from typing import TYPE_CHECKING

from rlhf_ray.config.problems import Problems

if TYPE_CHECKING:
    from rlhf_ray.config.ppo import PPOConfig

KEY = "placement.share"
TRAINERS = ("policy", "critic")


def check_sharing(config: "PPOConfig", problems: Problems) -> None:
    """Refuses sets of groups that cannot share, rank by rank."""
    counts = Counter(name for together in config.placement.share for name in together)
    for name, count in counts.items():
        if count > 1:
            problems.add(KEY, f"names {name} {count} times; put all groups that share with it into one set, once each")
    parts = (config.policy.gpus, config.rollout.gpus)
    if all(0 < part < 1 for part in parts) and "policy" not in config.placement.partners("rollout"):
        problems.add(
            "rollout.gpus",
            f"{parts[1]:g} beside `policy.gpus` {parts[0]:g} could put both on one GPU, where NCCL sends nothing; "
            f"name both in one set of `{KEY}`, or set either to 1",
        )
    for together in config.placement.share:
        _check_set(config, together, problems)


def _check_set(config: "PPOConfig", together: list[str], problems: Problems) -> None:
    keys = {name: "rollout.engines" if name == "rollout" else f"{name}.processes" for name in together}
    counts = {name: _count(config, name) for name in together}
    gpus = {name: getattr(config, name).gpus for name in together}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"`{keys[name]}` {counts[name]}" for name in together)
        problems.add(KEY, f"pairs groups rank by rank, and they differ in number ({found}); make them equal")
    if "rollout" in together and config.rollout.min_engines is not None:
        problems.add("rollout.min_engines", "given, but engines that share GPUs start all together; remove it")
    if any(gpus.values()) and not all(gpus.values()):
        without = ", ".join(f"`{name}.gpus`" for name in together if not gpus[name])
        problems.add(KEY, f"has groups on a GPU and others without one ({without} 0); give them a part of it, or none")
    if "rollout" in together and config.rollout.nodes_per_engine > 1:
        problems.add(
            "rollout.nodes_per_engine",
            f"{config.rollout.nodes_per_engine}, but an engine that shares (`{KEY}`) is on one node; set it to 1",
        )
    if round(sum(gpus.values()), 6) > 1:
        parts = ", ".join(f"`{name}.gpus` {gpus[name]:g}" for name in together)
        problems.add(KEY, f"needs more than one GPU for a process of each ({parts}); let them add up to 1 at most")
    if max(counts.values()) > 1 and 0 < round(sum(gpus.values()), 6) <= 0.5:
        problems.add(
            KEY,
            f"takes {sum(gpus.values()):g} of a GPU for a rank of each group, and two ranks of one group could sit on "
            "one GPU; let their `gpus` add up to more than half",
        )
    if config.ppo.max_staleness and trains_beside_engines(config, together):
        problems.add(
            "ppo.max_staleness",
            f"{config.ppo.max_staleness}, but engines and trainers that share GPUs (`{KEY}`) work in turns; set it to "
            "0, or give them GPUs of their own",
        )
    for name in together:
        if name in config.placement.spread:
            problems.add("placement.spread", f"names {name}, which shares (`{KEY}`); take it out of either")
    _check_labels(config, together, problems)
    if trains_beside_engines(config, together) and config.training.zero_stage == 0:
        problems.add(
            "training.zero_stage",
            f"0, which cannot give up its optimizer's memory while the engines work (`{KEY}`); set it to 1, 2 or 3",
        )


def trains_beside_engines(config: "PPOConfig", together: list[str]) -> bool:
    """Whether a set of groups has engines and trainers on the same GPUs, which they then use in turns."""
    return "rollout" in together and bool(set(TRAINERS) & set(together)) and config.rollout.gpus > 0


def _count(config: "PPOConfig", name: str) -> int:
    return config.rollout.engines if name == "rollout" else getattr(config, name).processes


def _check_labels(config: "PPOConfig", together: list[str], problems: Problems) -> None:
    labels = config.placement.labels
    for label in sorted({label for name in together for label in labels.get(name, {})}):
        asked = {name: labels[name][label] for name in together if label in labels.get(name, {})}
        if len(set(asked.values())) > 1:
            found = ", ".join(f"{name} {value}" for name, value in asked.items())
            problems.add(
                "placement.labels", f"asks for several values of {label} ({found}) in groups that share; use one"
            )
