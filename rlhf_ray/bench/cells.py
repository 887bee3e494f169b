"""The speed of each kind of work, as cells from which `rlhf-ray plan --throughput` estimates other runs.

Scoring and training are measured as a run does them: from the spans of its processes, less the time in which others
had a part of their cores or GPUs. Engines are measured alone, after the run, with few and with many responses at a
time; so their cells say what a step costs while the last responses are sampled.
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rlhf_ray.bench.workload import Fixed, make_workload
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.driver.groups import critic_model
from rlhf_ray.errors import ModelError
from rlhf_ray.placement.cells import Cell, Device, Head, forward_flops, matrix_flops, step_flops
from rlhf_ray.placement.flow import Places
from rlhf_ray.placement.layout import Layout
from rlhf_ray.placement.memory import BYTES
from rlhf_ray.placement.schedule import Group, groups_of, places_of
from rlhf_ray.placement.shapes import ModelShape, find_shape
from rlhf_ray.placement.speeds import Samples
from rlhf_ray.rollout.engine import SampleRequest
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.tracking.activity import group_of
from rlhf_ray.tracking.timeline import Span, Timeline, cut, iterations, nobody_busy

# What processes compute in, of the names of their spans.
COMPUTING = ("generate", "log-probabilities", "scores", "forward", "step")
# Of an engine: the most steps and repeats of one measurement.
MOST_STEPS = 64
REPEATS = 3


def engine_cells(config: PPOConfig, pool: RolloutPool, samples: Samples) -> list[Cell]:
    """Steps of the engines with several numbers of responses at a time, and the prompts.

    Args:
        config: the run.
        pool: its engines, which serve.
        samples: lengths.
    """
    group = _groups(config)["rollout"]
    shape = _shape(config.policy.path)
    size, dtype = matrix_flops(shape, "causal"), config.rollout.dtype
    prompt = sum(samples.prompts) // len(samples.prompts)
    tokens = max(2, min(MOST_STEPS, sum(samples.responses) // len(samples.responses)))
    most = max(1, min(config.rollout.max_concurrency, len(samples.responses) // group.processes))
    seeds = itertools.count()

    def seconds(at_once: int, new_tokens: int) -> float:
        count = at_once * group.processes
        return statistics.median(_sample(pool, shape, count, prompt, new_tokens, next(seeds)) for _ in range(REPEATS))

    found = []
    for at_once in sorted({1, max(1, most // 16), max(1, most // 4), most}):
        first = seconds(at_once, 1)
        step = max(seconds(at_once, tokens) - first, 1e-6) / (tokens - 1)
        found.append(Cell("sample", "causal", dtype, group.device, size, step * group.units, at_once))
    # The step that computes the prompts samples a token, too; `first` and `step` are those of the most.
    prompts_s = max(first - step, 1e-6) / (most * prompt)
    return [*found, Cell("prompt", "causal", dtype, group.device, size, prompts_s * group.units)]


def _sample(pool: RolloutPool, shape: ModelShape, count: int, prompt: int, new_tokens: int, seed: int) -> float:
    """Seconds to sample responses of one length to new prompts of one length."""
    prompts = make_workload(Fixed(prompt), Fixed(new_tokens), count, 1, shape.vocab, 1_000_000 + seed).prompts
    requests = [SampleRequest(f"{index}", 0, ids, seed, 1.0, new_tokens) for index, ids in enumerate(prompts)]
    started = time.perf_counter()
    for _ in pool.generate(requests):
        pass
    return time.perf_counter() - started


def run_cells(
    config: PPOConfig, timeline: Timeline, rows: list[dict[str, float]], samples: Samples, cores: float
) -> list[Cell]:
    """Scoring, training, transfer and the driver, from the iterations of a run.

    Args:
        config: the run.
        timeline: of all of it.
        rows: metrics of the iterations that count.
        samples: what each iteration works on.
        cores: that the run's processes share, of all nodes.
    """
    groups = _groups(config)
    places = places_of(groups, cores)
    spans = [iterations(timeline)[int(row["step"])] for row in rows]
    alone = [alone_seconds(cut(timeline, span.start, span.end), places) for span in spans]
    tokens = sum(prompt + response for prompt, response in samples.sequences)
    policy, critic = _shape(config.policy.path), _shape(critic_model(config))
    rewards = [_shape(item.path) for item in config.reward.models]
    causal = forward_flops(policy, "causal", samples.sequences)
    scalar = forward_flops(critic, "scalar", samples.sequences)
    scored = sum(forward_flops(shape, "scalar", samples.sequences) for shape in rewards)
    training, recomputed = config.training.dtype, config.training.gradient_checkpointing
    kinds: list[tuple[str, str, str, Head, str, float, int]] = [
        ("reference", "log-probabilities", "forward", "causal", config.reference.dtype, causal, 1),
        ("reward", "scores", "forward", "scalar", config.reference.dtype, scored, 1),
        ("critic", "forward", "forward", "scalar", training, scalar, 1),
        ("policy", "step", "step", "causal", training, step_flops(causal, recomputed=recomputed), config.ppo.epochs),
        ("critic", "step", "step", "scalar", training, step_flops(scalar, recomputed=recomputed), config.ppo.epochs),
    ]
    found = []
    for name, span, work, head, dtype, size, passes in kinds:
        group = groups[name]
        seconds = statistics.median(one.get((name, span), 0.0) for one in alone) * group.units / (tokens * passes)
        if seconds and size:
            found.append(Cell(work, head, dtype, group.device, size, seconds))
    rollout, device = config.rollout.dtype, groups["rollout"].device
    transfer = statistics.median(row["time/transfer"] for row in rows)
    found.append(Cell("transfer", "causal", rollout, device, policy.parameters * BYTES[rollout], transfer))
    driver = statistics.median(nobody_busy(timeline, s.start, s.end) * (s.end - s.start) for s in spans)
    found.append(Cell("driver", "causal", rollout, device, 1.0, driver / len(samples.responses)))
    return found


def alone_seconds(timeline: Timeline, places: Places) -> dict[tuple[str, str], float]:
    """Seconds that the processes of each group would have taken alone for each kind of span, summed over them.

    While several share a place, each of them gets the part of it that `Places.speeds` says.
    """
    spans = [
        (actor, span)
        for actor, of_actor in timeline.items()
        for span in of_actor
        if actor != "driver" and span.name in COMPUTING
    ]
    found: dict[tuple[str, str], float] = {}
    for seconds, working in _moments(spans):
        speeds = places.speeds({actor for actor, _ in working})
        for actor, span in working:
            key = group_of(actor), span.name
            found[key] = found.get(key, 0.0) + seconds * speeds[actor]
    return found


def _moments(spans: list[tuple[str, Span]]) -> Iterator[tuple[float, list[tuple[str, Span]]]]:
    """The stretches of time in which the same spans are open, as seconds and those spans."""
    edges = sorted({edge for _, span in spans for edge in (span.start, span.end)})
    for start, end in itertools.pairwise(edges):
        yield end - start, [(actor, span) for actor, span in spans if span.start <= start and span.end >= end]


def rollout_cells(config: PPOConfig, rows: list[dict[str, Any]]) -> list[Cell]:
    """Steps of the engines from rows of `bench rollout`, those of responses of one length; prompts are in them."""
    shape, group = find_shape(config.policy.path), _groups(config)["rollout"]
    if shape is None:  # a model of the hub whose config.json is not at hand
        return []
    found = []
    for row in rows:
        if not row["response_tokens"].isdecimal():
            continue  # how many are under way changes all the time
        engines = row["engines"]
        at_once = min(row["max_concurrency"], max(1, row["requests"] // engines))
        units = row["tensor_parallel"] if group.device == "GPU" else group.units
        seconds = at_once * engines / row["generated_tokens_per_s"]["median"] * units
        size = matrix_flops(shape, "causal")
        found.append(Cell("sample", "causal", config.rollout.dtype, group.device, size, seconds, at_once))
    return found


def transfer_cells(config: PPOConfig, row: dict[str, Any]) -> list[Cell]:
    """The transfer of `bench transfer`."""
    device: Device = "GPU" if config.rollout.gpus else "CPU"
    seconds = row["transfer_s"]["median"]
    return [Cell("transfer", "causal", config.rollout.dtype, device, float(row["bytes"]), seconds)]


def as_values(cells: list[Cell]) -> list[dict[str, Any]]:
    """Cells for JSON."""
    return [asdict(cell) for cell in cells]


def _groups(config: PPOConfig) -> dict[str, Group]:
    """The groups of the run as configured; who sits with whom follows from `placement.share` alone here."""
    return groups_of(config, Layout([], {}))


def _shape(name: str) -> ModelShape:
    shape = find_shape(name)
    if shape is None:
        raise ModelError(f"{name} has no config.json here that tells its size")
    return shape
