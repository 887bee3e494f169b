"""What the processes of a PPO run do in an iteration, as jobs that wait for each other (`flow.py`). Pure."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.placement.cells import Device
from rlhf_ray.placement.flow import Job, Places
from rlhf_ray.placement.layout import Layout
from rlhf_ray.placement.speeds import Samples, Speeds

GROUPS = ("rollout", "reference", "reward", "critic", "policy")
TRAINERS = ("critic", "policy")
CORES = "cores"


@dataclass(frozen=True)
class Group:
    """The processes of a group.

    Attributes:
        processes: how many (rollout: engines).
        units: cores or GPUs on which each of them computes.
        device: which of the two.
        together: the groups whose processes sit on the same GPUs, rank by rank, itself included.
        cores: numbers of the cores that each of them is bound to; none is all (`placement.cores`).
    """

    processes: int
    units: float
    device: Device
    together: tuple[str, ...]
    cores: tuple[int, ...] = ()


def groups_of(config: PPOConfig, layout: Layout) -> dict[str, Group]:
    """The groups of a run, as they sit. A process on a CPU computes with a thread a core, and with one at least."""
    sets = [set(together) for together in config.placement.share]
    users: dict[tuple[int, int], set[str]] = {}
    for seat in layout.seats:
        for gpu in seat.gpus:
            users.setdefault((seat.node, gpu), set()).add(seat.group)
    for together in {frozenset(names) for names in users.values()}:
        apart = [one for one in sets if not one & together]
        sets = [*apart, set(together).union(*(one for one in sets if one & together))]
    found = {}
    for name in GROUPS:
        section = getattr(config, name)
        processes = config.rollout.engines if name == "rollout" else section.processes
        split = config.rollout.tensor_parallel if name == "rollout" else 1
        if section.gpus:
            beside = next((one for one in sets if name in one), {name})
            found[name] = Group(processes, split, "GPU", tuple(other for other in GROUPS if other in beside))
        else:
            bound = tuple(config.placement.cores.get(name, ()))
            found[name] = Group(processes, float(max(1, int(section.cpus))), "CPU", (name,), bound)
    return found


def places_of(groups: dict[str, Group], cores: float, nodes: int = 1) -> Places:
    """The cores, where they are fewer than all threads or processes are bound to some of them; and every GPU with
    processes of several groups.

    Args:
        groups: who computes on what. Their processes are named as the actors are, `policy-0`.
        cores: of all nodes.
        nodes: how many.
    """
    on_cpu = [one for one in groups.values() if one.device == "CPU"]
    each = range(max([round(cores / nodes), *(number + 1 for one in on_cpu for number in one.cores)]))
    capacity: dict[str, float] = {}
    if any(one.cores for one in on_cpu):
        capacity = {f"core {number}": float(nodes) for number in each}
    elif sum(one.processes * one.units for one in on_cpu) > cores:
        capacity = {CORES: cores}
    takes: dict[str, dict[str, float]] = {}
    for name, group in groups.items():
        for rank in range(group.processes):
            if group.device == "CPU":
                mine = [f"core {number}" for number in group.cores or each] if CORES not in capacity else [CORES]
                takes[f"{name}-{rank}"] = {place: group.units / len(mine) for place in mine if place in capacity}
            elif len(group.together) > 1:
                place = f"{', '.join(group.together)}/{rank}"
                capacity[place] = 1.0
                takes[f"{name}-{rank}"] = {place: 1.0}
    return Places(capacity, takes)


def finished_responses(
    config: PPOConfig, groups: dict[str, Group], samples: Samples, speeds: Speeds
) -> list[tuple[float, int]]:
    """When each response is finished if nobody shares the engines' place, and which; in this order."""
    rollout = groups["rollout"]
    count, each = rollout.processes, samples.each
    found: list[tuple[float, int]] = []
    for engine in range(min(count, len(samples.prompts))):
        # Prompts of equal limits go round the engines.
        mine = [p * each + s for p in range(engine, len(samples.prompts), count) for s in range(each)]
        lengths = [samples.responses[index] for index in mine]
        prompts = [samples.prompts[index // each] if index % each == 0 else 0 for index in mine]
        times = decoding(lengths, prompts, config.rollout.max_concurrency, speeds.decode_s, speeds.prompt_s)
        found += [(time / rollout.units, index) for time, index in zip(times, mine, strict=True)]
    return sorted(found)


def decoding(
    lengths: Sequence[int], prompts: Sequence[int], most: int, step_s: Callable[[int], float], prompt_s: float
) -> list[float]:
    """When each response of an engine is finished: it takes up as many as it may, and the next as one ends.

    Args:
        lengths: tokens of the responses.
        prompts: tokens of the prompts that are computed for each; 0 where another response has the same.
        most: responses at a time.
        step_s: seconds of a step, with so many of them.
        prompt_s: seconds of a token of a prompt, meanwhile nobody gets a token.
    """
    found = [0.0] * len(lengths)
    running: list[tuple[int, int]] = []  # step after which it is finished, response
    seconds: dict[int, float] = {}
    now, steps, begun = 0.0, 0, 0
    while running or begun < len(lengths):
        while begun < len(lengths) and len(running) < most:
            heapq.heappush(running, (steps + lengths[begun], begun))
            now += prompts[begun] * prompt_s
            begun += 1
        count = len(running)
        if count not in seconds:
            seconds[count] = step_s(count)
        end = running[0][0]
        now += (end - steps) * seconds[count]
        steps = end
        while running and running[0][0] == end:
            found[heapq.heappop(running)[1]] = now
    return found


def rollout_jobs(
    config: PPOConfig, groups: dict[str, Group], samples: Samples, speeds: Speeds, *, with_values: bool
) -> list[Job]:
    """From the first token to the last score. Scorers get what is finished as `Scorer.score` hands it out."""
    finished = finished_responses(config, groups, samples, speeds)
    jobs: list[Job] = []
    tokens, begun, turn = 0, 0.0, 0
    for position, (time, index) in enumerate(finished):
        tokens += sum(samples.sequences[index])
        if tokens < config.reference.micro_batch_tokens and position + 1 < len(finished):
            continue
        sampled = len(jobs)
        jobs.append(Job("rollout", time - begun))
        for name, each in (("reference", speeds.reference_s), ("reward", speeds.reward_s)):
            group = groups[name]
            jobs.append(Job(f"{name}-{turn % group.processes}", tokens * each / group.units, after=sampled))
        if with_values:
            critic = groups["critic"]
            jobs.append(Job("critic", tokens * speeds.values_s / critic.units / critic.processes, after=sampled))
        tokens, begun, turn = 0, time, turn + 1
    return jobs


def training_jobs(
    config: PPOConfig, groups: dict[str, Group], samples: Samples, speeds: Speeds, *, with_values: bool
) -> list[Job]:
    """Values and old log-probabilities where they are computed now, and the steps of policy and critic, in pairs."""
    ppo = config.ppo
    lengths = [prompt + response for prompt, response in samples.sequences]
    steps = ppo.epochs * ppo.minibatches
    jobs = []

    def seconds(name: str, each: float, part: int) -> float:
        group = groups[name]
        return fullest(lengths[::part], group.processes) * each / group.units

    if with_values:
        jobs.append(Job("critic", seconds("critic", speeds.values_s, 1)))
    if steps > 1:
        jobs.append(Job("policy", seconds("policy", speeds.old_logprobs_s, 1)))
    for _ in range(steps):
        # Each step begins once both have done the one before; whoever was slower stays so.
        after = _slower(jobs)
        for name in TRAINERS:
            jobs.append(Job(name, seconds(name, speeds.train_s[name], ppo.minibatches), after=after))
    return jobs


def _slower(jobs: list[Job]) -> int | None:
    """Which of the last two jobs takes longer; None where there are none."""
    last = range(max(0, len(jobs) - 2), len(jobs))
    return max(last, key=lambda index: jobs[index].seconds, default=None)


def fullest(lengths: Sequence[int], processes: int) -> int:
    """Tokens of the fullest of some processes: sequences go to the emptiest, the longest first, as `packing` does."""
    loads = [0] * processes
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(loads, loads[0] + length)
    return max(loads)
