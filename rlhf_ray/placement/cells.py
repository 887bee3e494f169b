"""Measured speeds, as `rlhf-ray bench ... --out FILE` writes them, and what they say of other models. Pure.

A cell is how long one core or one GPU took for one unit of one kind of work. A model of another size takes as long as
its floating-point operations are more: in proportion to the nearest cell, or between two cells of different sizes on
the straight line through both in logarithms, since large matrices are multiplied faster than small ones.
"""

import bisect
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.shapes import ModelShape

Device = Literal["CPU", "GPU"]
Head = Literal["causal", "scalar"]
# What one unit of each kind of work is, for people.
UNITS = {
    "sample": "a step of an engine, which gives each of its responses a token",
    "prompt": "a token of a prompt, in an engine",
    "forward": "a token of a forward pass",
    "step": "a token of an optimizer step",
    "transfer": "new weights to all engines",
    "driver": "the driver's own time a response",
}


@dataclass(frozen=True)
class Cell:
    """One measured speed.

    Attributes:
        work: one of `UNITS`.
        head: of the model, `causal` or `scalar`.
        dtype: its precision.
        device: what it ran on.
        size: floating-point operations a token; of a transfer, bytes of the weights.
        seconds: of one core or GPU for one unit of the work; of a transfer and of the driver, as they are.
        at_once: responses that the engine sampled at a time; 0 for other work.
    """

    work: str
    head: Head
    dtype: str
    device: Device
    size: float
    seconds: float
    at_once: int = 0


def matrix_flops(shape: ModelShape, head: Head) -> float:
    """Floating-point operations of the matrices for one token, forward: two for each of their parameters."""
    body = shape.layers * shape.largest_layer
    return 2.0 * (body + (shape.vocab * shape.hidden if head == "causal" else shape.hidden))


def forward_flops(shape: ModelShape, head: Head, sequences: Sequence[tuple[int, int]]) -> float:
    """The same for a token of whole sequences, on average, with attention; logits are those of the responses alone.

    A token at position t meets t keys and values: 4 t operations for each of the width and of the layers.

    Args:
        shape: of the model.
        head: on it.
        sequences: tokens of the prompt and of the response of each.
    """
    tokens = sum(prompt + response for prompt, response in sequences)
    targets = sum(response for _, response in sequences)
    squares = sum((prompt + response) ** 2 for prompt, response in sequences)
    body = 2.0 * shape.layers * shape.largest_layer
    logits = 2.0 * shape.vocab * shape.hidden * targets / tokens if head == "causal" else 2.0 * shape.hidden
    return body + logits + 2.0 * shape.layers * shape.attention_width * squares / tokens


def step_flops(forward: float, *, recomputed: bool) -> float:
    """Those of an optimizer step, a token: the backward pass is two forward passes, and one more where activations are
    computed again (`training.gradient_checkpointing`)."""
    return (4.0 if recomputed else 3.0) * forward


class Cells:
    """What was measured.

    Attributes:
        all: every cell.

    Args:
        cells: the same.
        source: where they are from, for errors.
    """

    def __init__(self, cells: Iterable[Cell], source: str) -> None:
        self.all = list(cells)
        self._source = source

    def seconds(self, work: str, head: Head, dtype: str, device: Device, size: float) -> float:
        """Of one core or GPU for one unit of the work.

        Raises:
            ConfigError: nothing of the kind was measured.
        """
        return _scaled([(cell.size, cell.seconds) for cell in self._matching(work, head, dtype, device)], size)

    def step_seconds(self, dtype: str, device: Device, size: float, at_once: int) -> float:
        """Of one core or GPU for a step of an engine with so many responses at a time.

        Between numbers that were measured a step's time follows a straight line. Below the smallest it stays what it
        is, as reading the weights takes it all; above the largest it grows in proportion.

        Raises:
            ConfigError: no engine was measured.
        """
        by_size: dict[float, dict[int, list[float]]] = {}
        for cell in self._matching("sample", "causal", dtype, device):
            by_size.setdefault(cell.size, {}).setdefault(cell.at_once, []).append(cell.seconds)
        curves = {size: {n: _mean(found) for n, found in curve.items()} for size, curve in by_size.items()}
        return _scaled([(measured, _on_curve(curve, at_once)) for measured, curve in curves.items()], size)

    def overhead(self) -> float:
        """Seconds of the driver itself for each response; 0 where none were measured."""
        found = [cell.seconds for cell in self.all if cell.work == "driver"]
        return _mean(found) if found else 0.0

    def sizes(self, work: str, head: Head, dtype: str, device: Device) -> tuple[float, float]:
        """The smallest and the largest size that were measured."""
        found = [cell.size for cell in self._matching(work, head, dtype, device)]
        return min(found), max(found)

    def concurrency(self, dtype: str, device: Device) -> tuple[int, int]:
        """The least and the most responses at a time that engines were measured with."""
        found = [cell.at_once for cell in self._matching("sample", "causal", dtype, device)]
        return min(found), max(found)

    def _matching(self, work: str, head: Head, dtype: str, device: Device) -> list[Cell]:
        of_work = [cell for cell in self.all if cell.work == work and cell.head == head]
        found = [cell for cell in of_work if cell.dtype == dtype and cell.device == device]
        if found:
            return found
        others = sorted({f"{cell.dtype} on a {cell.device}" for cell in of_work}) or ["none"]
        raise ConfigError(
            f"--throughput: the configuration needs the speed of {work!r} ({UNITS[work]}) with a {head} model in "
            f"{dtype} on a {device}, and {self._source} holds {', '.join(others)}; measure on the hardware that the "
            f"configuration is for, `rlhf-ray bench iteration --dtype {dtype} --out FILE`, and name that file, too"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _scaled(points: Sequence[tuple[float, float]], size: float) -> float:
    """Seconds at a size, from (size, seconds): on the line through its neighbours in logarithms, or in proportion."""
    by_size: dict[float, list[float]] = {}
    for measured, seconds in points:
        by_size.setdefault(measured, []).append(seconds)
    known = sorted((measured, _mean(found)) for measured, found in by_size.items())
    above = bisect.bisect_left([measured for measured, _ in known], size)
    if above in (0, len(known)):
        measured, seconds = known[min(above, len(known) - 1)]
        return seconds * size / measured
    (low, first), (high, last) = known[above - 1], known[above]
    return first * (last / first) ** (math.log(size / low) / math.log(high / low))


def _on_curve(curve: dict[int, float], at_once: int) -> float:
    """Seconds of a step with so many responses, from those of other numbers."""
    known = sorted(curve.items())
    above = bisect.bisect_left([n for n, _ in known], at_once)
    if above == 0:
        return known[0][1]
    if above == len(known):
        most, seconds = known[-1]
        return seconds * at_once / most
    (low, first), (high, last) = known[above - 1], known[above]
    return first + (last - first) * (at_once - low) / (high - low)


def load_cells(paths: Sequence[Path]) -> tuple[Cells, list[str]]:
    """The cells of some files, and a line on each of them: what it measured on which machine.

    Raises:
        ConfigError: a file cannot be read, or holds none.
    """
    found: list[Cell] = []
    lines = []
    for path in paths:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            cells = [Cell(**values) for values in report["cells"]]
            cells = [cell for cell in cells if cell.work in UNITS and cell.seconds > 0 and cell.size > 0]
            lines.append(f"{path}: {_where(report)}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--throughput: {path} holds no measured speeds ({type(error).__name__}: {error}); give a file that "
                "`rlhf-ray bench iteration|rollout|transfer --out FILE` of this version wrote"
            ) from None
        if not cells:
            raise ConfigError(
                f"--throughput: {path} holds no measured speeds; give a file of `rlhf-ray bench iteration --out FILE`"
            )
        found += cells
    return Cells(found, ", ".join(map(str, paths))), lines


def _where(report: dict[str, Any]) -> str:
    nodes = report.get("hardware", [])
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("cpus", "gpus"))
    kind, processor = report.get("benchmark", "measured"), report.get("processor", "unknown processor")
    return f"{kind} on {cpus:g} core{'s' * (cpus != 1)} and {gpus:g} GPU{'s' * (gpus != 1)}, {processor}"
