"""An estimate of throughput as text for people and as plain values for programs."""

from dataclasses import asdict
from typing import Any

from rlhf_ray.placement.plan import count_key
from rlhf_ray.placement.speeds import Samples
from rlhf_ray.placement.throughput import ALL_CORES, Option, Throughput

# Less than this part of an iteration is no gain worth a name.
LEAST_GAIN = 0.005


def forecast_values(found: Throughput, samples: Samples) -> dict[str, Any]:
    """Everything of an estimate for JSON, in seconds, the best option first."""
    now = found.estimate
    return {
        "iteration_s": now.iteration_s,
        "tokens_per_s": now.tokens_per_s,
        "limiting": now.limiting,
        "parts_s": now.parts_s,
        "bounds_s": now.bounds_s,
        "groups": {
            name: {"busy_s": busy, "idle": _idle(found, name), **asdict(found.groups[name])}
            for name, busy in now.busy_s.items()
        },
        "responses": len(samples.responses),
        "mean_prompt_tokens": sum(samples.prompts) / len(samples.prompts),
        "mean_response_tokens": sum(samples.responses) / len(samples.responses),
        "options": [asdict(option) for option in found.options],
        "notes": found.notes,
    }


def forecast_lines(found: Throughput, samples: Samples) -> list[str]:
    """An estimate for people."""
    now = found.estimate
    mean = sum(samples.responses) / len(samples.responses)
    prompt = sum(samples.prompts) / len(samples.prompts)
    lines = [
        f"{len(samples.responses)} responses of {mean:.0f} tokens on average (at most {max(samples.responses)}) to "
        f"prompts of {prompt:.0f}: {_seconds(now.iteration_s)} an iteration, {now.tokens_per_s:.0f} tokens/s"
    ]
    parts = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in now.parts_s.items() if seconds)
    if now.bounds_s:
        bound = max(now.bounds_s, key=lambda name: now.bounds_s[name])
        lines.append(f"  one after the other: {parts}")
        least = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in now.bounds_s.items())
        lines.append(f"  at least, as sampling is ahead: {least}; the largest holds, {bound}")
    else:
        lines.append(f"  {parts}")
    for name, busy in now.busy_s.items():
        group = found.groups[name]
        lines.append(
            f"  {name}: {group.processes} x {_units(group.units, group.device)}, works {_seconds(busy)}, "
            f"idle {_idle(found, name):.0%}"
        )
    lines.append(f"  the iteration waits most for: {now.limiting}")
    lines += _advice(found)
    return lines + [f"  note: {note}" for note in found.notes]


def _idle(found: Throughput, name: str) -> float:
    """Part of the iteration in which a process of a group has nothing to do; less where others take of its place."""
    return max(0.0, 1.0 - found.estimate.busy_s[name] / found.estimate.iteration_s)


def _advice(found: Throughput) -> list[str]:
    """What the next core or GPU should be given to, and what the others would do."""
    lines = []
    for device, word in (("GPU", "GPU"), ("CPU", "core")):
        options = [option for option in found.options if option.device == device]
        if not options:
            continue
        best = options[0]
        if best.saved_s < LEAST_GAIN * found.estimate.iteration_s:
            lines.append(f"  the next {word}: no group gets an iteration done sooner with it")
            continue
        lines.append(f"  the next {word} to {_name(best)}: {_change(best, found)}")
        lines += [f"    or to {_name(one)}: {_change(one, found)}" for one in options[1:]]
    return lines


def _name(option: Option) -> str:
    return " with ".join(option.groups)


def _change(option: Option, found: Throughput) -> str:
    """The keys of an option, and what it does."""
    now = found.estimate.iteration_s
    keys = [f"{count_key(name)}={found.groups[name].processes + 1}" for name in option.groups if name != ALL_CORES]
    taken = f" takes {_units(option.units, option.device)}" if option.units != 1 else ""
    change = f"{', '.join(keys)}{taken}, " if keys else ""
    word = "GPU" if option.device == "GPU" else "core"
    each = f", {_seconds(max(0.0, option.saved_s))} a {word}" if option.units != 1 else ""
    return f"{change}{_seconds(option.iteration_s)} an iteration ({option.iteration_s / now - 1:+.1%}{each})"


def _units(units: float, device: str) -> str:
    word = "GPU" if device == "GPU" else "core"
    return f"{units:g} {word}{'' if units == 1 else 's'}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
