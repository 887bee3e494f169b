"""How long an iteration of PPO takes, from measured speeds: a pure function of configuration, seats and cells.

docs/throughput.md has the formulas. In short: an engine's step takes as long as it was measured to for as many
responses; scorers begin as responses finish (`scoring/scorer.py`); policy and critic train side by side; whoever
shares cores or a GPU meanwhile is slower (`flow.py`). With `ppo.max_staleness` sampling and training overlap.
"""

import math
from dataclasses import dataclass, replace

from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.placement.cells import Cells, Device
from rlhf_ray.placement.flow import Places, ends
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.layout import Layout
from rlhf_ray.placement.memory import Shapes
from rlhf_ray.placement.schedule import CORES, TRAINERS, Group, groups_of, places_of, rollout_jobs, training_jobs
from rlhf_ray.placement.speeds import Samples, Speeds

ALL_CORES = "all groups"


@dataclass(frozen=True)
class Estimate:
    """One iteration, in seconds.

    Attributes:
        iteration_s: all of it.
        parts_s: what it waits for, one after the other. Their sum is `iteration_s`, where sampling is not ahead.
        bounds_s: with `ppo.max_staleness`, what it takes at least, each for a reason of its own; the largest is
            `iteration_s`.
        busy_s: of each group, what a process of it works if nobody shares its cores or GPUs; of several engines, the
            slowest.
        limiting: whom the iteration waits for most.
        generated: tokens of its responses.
    """

    iteration_s: float
    parts_s: dict[str, float]
    bounds_s: dict[str, float]
    busy_s: dict[str, float]
    limiting: str
    generated: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens sampled, scored and trained on a second."""
        return self.generated / self.iteration_s


@dataclass(frozen=True)
class Option:
    """What one more process of a group would do.

    Attributes:
        groups: who gets it: a group, or all that sit together; `ALL_CORES` is a core more for the processes there are.
        units: cores or GPUs that it takes.
        device: which of the two.
        iteration_s: with it.
        saved_s: less than without, for each core or GPU.
    """

    groups: tuple[str, ...]
    units: float
    device: Device
    iteration_s: float
    saved_s: float


@dataclass(frozen=True)
class Throughput:
    """The estimate of a configuration, and what more cores or GPUs would do.

    Attributes:
        estimate: of the configuration.
        groups: who computes on what.
        options: the best first.
        notes: what the estimate does not know.
    """

    estimate: Estimate
    groups: dict[str, Group]
    options: list[Option]
    notes: list[str]


def throughput(
    config: PPOConfig, layout: Layout, nodes: list[Node], samples: Samples, cells: Cells, shapes: Shapes
) -> Throughput:
    """Estimate an iteration, and then with one more process of each group.

    Args:
        config: the run.
        layout: where its processes sit.
        nodes: where it runs.
        samples: lengths of prompts and responses.
        cells: measured speeds.
        shapes: finds a model's shape.

    Raises:
        ConfigError: a speed that it needs was not measured.
        ModelError: a model's size is not known.
    """
    groups = groups_of(config, layout)
    speeds = Speeds(config, samples, cells, shapes, {name: group.device for name, group in groups.items()})
    cores = sum(node.cpus for node in nodes)
    now = estimate(config, groups, places_of(groups, cores, len(nodes)), samples, speeds)

    def option(together: tuple[str, ...], larger: dict[str, Group], units: float, device: Device) -> Option:
        places = places_of(larger, cores + (units if device == "CPU" else 0.0), len(nodes))
        then = estimate(config, larger, places, samples, speeds).iteration_s
        return Option(together, units, device, then, (now.iteration_s - then) / units)

    options = []
    for together in dict.fromkeys(group.together for group in groups.values()):
        larger = {name: replace(one, processes=one.processes + (name in together)) for name, one in groups.items()}
        # Those that sit together share each further GPU.
        units = max(groups[name].units for name in together)
        options.append(option(together, larger, units, groups[together[0]].device))
    if CORES in places_of(groups, cores, len(nodes)).capacity:
        options.append(option((ALL_CORES,), groups, 1.0, "CPU"))
    options.sort(key=lambda one: -one.saved_s)
    return Throughput(now, groups, options, speeds.notes())


def estimate(config: PPOConfig, groups: dict[str, Group], places: Places, samples: Samples, speeds: Speeds) -> Estimate:
    """An iteration of a run with these groups.

    Args:
        config: the run; how many processes its groups have is taken from `groups`.
        groups: who computes on what.
        places: what they share, of `places_of`.
        samples: lengths of prompts and responses.
        speeds: of each kind of work.
    """
    ahead = config.ppo.max_staleness
    places = places.as_one(("rollout", *TRAINERS))
    before = rollout_jobs(config, groups, samples, speeds, with_values=not ahead)
    scored = ends(before, places)
    after = training_jobs(config, groups, samples, speeds, with_values=bool(ahead))
    trained = ends(after, places)
    busy = dict.fromkeys(groups, 0.0)
    for job in [*before, *after]:
        name = job.process.partition("-")[0]
        busy[name] += job.seconds / (1 if name == job.process else groups[name].processes)
    sampled = max(end for end, job in zip(scored, before, strict=True) if job.process == "rollout")
    parts = {
        "sampling": sampled,
        "scoring": max(scored) - sampled,
        "training": max(trained),
        "transfer": speeds.transfer_s,
        "driver": speeds.driver_s * len(samples.responses),
    }
    last = {job.process: end for job, end in zip(after, trained, strict=True)}
    who = {
        "sampling": "rollout",
        "scoring": max(zip(scored, before, strict=True), key=lambda pair: pair[0])[1].process.partition("-")[0],
        "training": max(last, key=lambda name: last[name]),
    }
    longest = max(parts, key=lambda part: parts[part])
    limiting, bounds, seconds = who.get(longest, longest), {}, sum(parts.values())
    if ahead:
        busy["rollout"] = _sampling_without_end(config, groups["rollout"], samples, speeds)
        bounds = _bounds(ahead, parts, busy, places)
        bound = max(bounds, key=lambda name: bounds[name])
        seconds = bounds[bound]
        # The way of a batch is as long as its longest part makes it.
        limiting = who["training"] if bound == "training" else limiting if bound == "way of a batch" else bound
    return Estimate(seconds, parts, bounds, busy, limiting, sum(samples.responses))


def _sampling_without_end(config: PPOConfig, rollout: Group, samples: Samples, speeds: Speeds) -> float:
    """Seconds of an engine for its part of an iteration, where responses of the next ones are always under way."""
    batches = config.ppo.max_staleness + 1
    at_once = min(config.rollout.max_concurrency, math.ceil(len(samples.responses) * batches / rollout.processes))
    steps = sum(samples.responses) / rollout.processes / at_once
    prompts = sum(samples.prompts) / rollout.processes
    return (steps * speeds.decode_s(at_once) + prompts * speeds.prompt_s) / rollout.units


def _bounds(ahead: int, parts: dict[str, float], busy: dict[str, float], places: Places) -> dict[str, float]:
    """What an iteration takes at least where sampling runs up to S = `ahead` iterations ahead.

    The batch that an iteration trains began S iterations before it, so that a batch's way through sampling, scoring,
    training and transfer takes S + 1 iterations at the most; and nobody works more than all the time.
    """
    training = parts["training"] + parts["transfer"] + parts["driver"]
    bounds = {
        "training": training,
        "way of a batch": (parts["sampling"] + parts["scoring"] + training) / (ahead + 1),
        "rollout": busy["rollout"] + parts["transfer"],  # which stops the engines
        "reference": busy["reference"],
        "reward": busy["reward"],
    }
    for place, capacity in places.capacity.items():
        load = sum(busy[process.partition("-")[0]] * taken.get(place, 0.0) for process, taken in places.takes.items())
        name = CORES if place == CORES else place.partition("/")[0]
        bounds[name] = max(bounds.get(name, 0.0), load / capacity)
    return bounds
