"""The timeline of a run: who generated, scored, trained, transferred and waited, from the spans of its processes.

`perfetto` gives Chrome's trace format, which https://ui.perfetto.dev opens; `draw` a picture; `idle_shares` the share
of the time in which each process had nothing to do, and `group_shares` the mean of each group.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

from rlhf_ray.errors import StageError
from rlhf_ray.tracking.activity import TRACE, group_of

COLORS = {
    "generate": "#3987e5",
    "forward": "#9085e9",
    "log-probabilities": "#9085e9",
    "scores": "#c98500",
    "step": "#d95926",
    "transfer": "#199e70",
    "checkpoint": "#898781",
}
OTHER = "#c3c2b7"


@dataclass(frozen=True)
class Span:
    """Something that a process did, in seconds since the epoch.

    Attributes:
        process: number of the process that did it; those that bear a name one after the other have each their own.
    """

    name: str
    start: float
    end: float
    details: Mapping[str, Any]
    process: int | None = None


Timeline = dict[str, list[Span]]


def read_timeline(run_dir: Path) -> Timeline:
    """The spans of every process of a run, by name, in the order in which they began.

    Raises:
        StageError: the directory holds none.
    """
    files = sorted((run_dir / TRACE).glob("*.jsonl"))
    if not files:
        raise StageError(f"{run_dir} holds no spans ({TRACE}/*.jsonl); name the directory of a PPO run that has begun")
    found: Timeline = {}
    for file in files:
        spans = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line that a killed process left half-written
            process = row.pop("process", None)
            spans.append(Span(row.pop("name"), row.pop("start"), row.pop("end"), row, process))
        found[file.stem] = sorted(spans, key=lambda span: span.start)
    return found


def iterations(timeline: Timeline) -> dict[int, Span]:
    """The span of each iteration that the driver finished; of one that was repeated after a resume, the last."""
    spans = [span for span in timeline.get("driver", []) if span.name == "iteration"]
    return {int(span.details["iteration"]): span for span in spans}


def cut(timeline: Timeline, start: float, end: float) -> Timeline:
    """What of the timeline lies between two moments; spans that cross one are cut there."""
    return {
        actor: [
            replace(span, start=max(span.start, start), end=min(span.end, end))
            for span in spans
            if span.end > start and span.start < end
        ]
        for actor, spans in timeline.items()
    }


def idle_shares(timeline: Timeline, start: float, end: float) -> dict[str, float]:
    """Share of the time between two moments in which each process (the driver aside) had no span open.

    Processes that were not there then are left out: engines that had left or came later.
    """
    return {
        actor: 1.0 - _covered(spans) / (end - start)
        for actor, spans in cut(timeline, start, end).items()
        if actor != "driver" and _there(timeline[actor], start, end)
    }


def nobody_busy(timeline: Timeline, start: float, end: float) -> float:
    """Share of the time between two moments in which no process, the driver aside, had a span open."""
    spans = [span for actor, found in cut(timeline, start, end).items() if actor != "driver" for span in found]
    return 1.0 - _covered(sorted(spans, key=lambda span: span.start)) / (end - start)


def _covered(spans: Sequence[Span]) -> float:
    """Seconds in which at least one of the spans, which are in the order of their beginnings, was open."""
    seconds, covered = 0.0, float("-inf")
    for span in spans:
        seconds += max(0.0, span.end - max(span.start, covered))
        covered = max(covered, span.end)
    return seconds


def _there(spans: Sequence[Span], start: float, end: float) -> bool:
    """Whether a process lived between two moments, as far as its spans tell: from its first to its last."""
    lives = [[span for span in spans if span.process == process] for process in {span.process for span in spans}]
    return any(min(s.start for s in life) < end and max(s.end for s in life) > start for life in lives)


def group_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """The mean idle share of each group, from those of its processes."""
    members: dict[str, list[float]] = {}
    for actor, share in shares.items():
        members.setdefault(group_of(actor), []).append(share)
    return {group: sum(of_group) / len(of_group) for group, of_group in members.items()}


def perfetto(timeline: Timeline) -> dict[str, Any]:
    """All spans in Chrome's trace format: a process an actor, times in microseconds from the first span."""
    origin = min((span.start for spans in timeline.values() for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for number, (actor, spans) in enumerate(timeline.items(), start=1):
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": actor}})
        events += [
            {
                "ph": "X",
                "name": span.name,
                "pid": number,
                "tid": lane,
                "ts": round((span.start - origin) * 1e6),
                "dur": round((span.end - span.start) * 1e6),
                "args": dict(span.details),
            }
            for lane, span in _lanes(spans)
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _lanes(spans: Sequence[Span]) -> list[tuple[int, Span]]:
    """A lane for each span: spans of one lane are nested or apart, as the format demands."""
    lanes: list[list[Span]] = []  # the spans of each that are still open
    found = []
    for span in spans:
        for stack in lanes:
            while stack and stack[-1].end <= span.start:
                stack.pop()
        free = [lane for lane, stack in enumerate(lanes) if not stack or stack[-1].end >= span.end]
        if not free:
            free = [len(lanes)]
            lanes.append([])
        lanes[free[0]].append(span)
        found.append((free[0], span))
    return found


def paint(axes: Any, timeline: Timeline, start: float, end: float) -> None:
    """Draw the time between two moments on matplotlib axes: a row a process, with its idle share and the groups'."""
    from matplotlib.patches import Patch

    shares = idle_shares(timeline, start, end)
    shown = {actor: spans for actor, spans in cut(timeline, start, end).items() if actor in shares}
    for row, spans in enumerate(shown.values()):
        for span in spans:
            bar = (span.start - start, span.end - span.start)
            axes.broken_barh([bar], (row - 0.38, 0.76), facecolors=COLORS.get(span.name, OTHER))
    axes.set_yticks(range(len(shown)), [f"{actor}, idle {shares[actor]:.0%}" for actor in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, end - start)
    means = ", ".join(f"{group}\N{NO-BREAK SPACE}{share:.0%}" for group, share in group_shares(shares).items())
    axes.set_xlabel("seconds\n" + fill(f"idle by group: {means}", 60))
    names = [name for name in COLORS if any(span.name == name for spans in shown.values() for span in spans)]
    handles = [Patch(color=COLORS[name], label=name) for name in names]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def draw(timeline: Timeline, start: float, end: float, title: str) -> Any:
    """A matplotlib figure of the time between two moments; see `paint`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.32 * len(timeline)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    paint(axes, timeline, start, end)
    return figure
