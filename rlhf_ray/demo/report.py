"""A page that shows one run of the demonstration: curves, replies before and after, figures, and how to read
them.

The page is one HTML file with its style and drawings inside; it loads nothing. A stage that has left no files
is named as missing, and the rest is drawn.
"""

import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_ray.demo.gold import gold_score, is_flattering
from rlhf_ray.errors import DataError
from rlhf_ray.tracking.activity import TRACE
from rlhf_ray.tracking.rundir import write_text
from rlhf_ray.tracking.timeline import iterations, read_timeline
from rlhf_ray.tracking.timeline import paint as paint_timeline

_INK = "#123456"  # stands for the page's own text colour, light or dark, in the drawings
_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7")
_MAX_REPLIES = 20

Points = list[tuple[float, float]]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Line:
    """One curve of a chart: a metric, or `gold` and `flattery`, which are measured on the samples."""

    key: str
    label: str
    right: bool = False  # drawn against an axis of its own on the right
    marks: bool = False  # measured at few steps


@dataclass(frozen=True)
class _Chart:
    title: str
    lines: tuple[_Line, ...]
    ceiling: bool = False  # has a line at the accuracy that the label noise allows


@dataclass(frozen=True)
class _Stage:
    folder: str
    title: str
    story: str
    charts: tuple[_Chart, ...]


_LOSSES = (_Line("loss", "training"), _Line("eval/loss", "held out", marks=True))
_STAGES = (
    _Stage(
        "sft",
        "Supervised fine-tuning",
        "The model learns to speak from demonstrations of mixed quality, so it imitates their flaws as well.",
        (_Chart("Loss (nats a token)", _LOSSES),),
    ),
    _Stage(
        "reward",
        "Reward model",
        "It sees pairs of replies and which one a rater preferred. Raters disagree, so no model can be right "
        "about all held-out pairs: the dotted line is the accuracy of the best possible one.",
        (
            _Chart("Loss (nats a pair)", _LOSSES),
            _Chart(
                "Accuracy",
                (_Line("accuracy", "training"), _Line("eval/accuracy", "held out", marks=True)),
                ceiling=True,
            ),
        ),
    ),
    _Stage(
        "ppo",
        "PPO",
        "The policy learns from the reward model alone. The gold score is only measured: where the learned "
        "score rises and the gold score falls, the policy exploits the reward model.",
        (
            _Chart(
                "Learned score and gold score",
                (_Line("objective/scores", "learned score"), _Line("gold", "gold score", right=True)),
            ),
            _Chart("KL to the SFT model (nats a reply)", (_Line("objective/kl", "KL"),)),
            _Chart(
                "Score and score less KL penalty",
                (_Line("objective/scores", "score"), _Line("objective/rlhf_reward", "score less penalty")),
            ),
            _Chart(
                "Length and flattery of replies",
                (
                    _Line("completions/mean_length", "mean tokens"),
                    _Line("flattery", "share that flatters", right=True),
                ),
            ),
            _Chart("Entropy (nats a reply)", (_Line("objective/entropy", "entropy"),)),
            _Chart(
                "Losses",
                (_Line("loss/policy_avg", "policy"), _Line("loss/value_avg", "value", right=True)),
            ),
            _Chart(
                "Size of the policy's steps",
                (
                    _Line("policy/approxkl_avg", "KL to the old policy"),
                    _Line("policy/clipfrac_avg", "clipped share", right=True),
                ),
            ),
        ),
    ),
    _Stage(
        "dpo",
        "DPO",
        "The same pairs without a reward model: the policy itself is the implicit reward.",
        (
            _Chart("Loss (nats a pair)", _LOSSES),
            _Chart(
                "Accuracy of the implicit reward",
                (
                    _Line("rewards/accuracies", "training"),
                    _Line("eval/rewards/accuracies", "held out", marks=True),
                ),
                ceiling=True,
            ),
        ),
    ),
)


@dataclass
class _Section:
    """A stage as the page shows it."""

    title: str
    story: str
    found: bool
    drawings: list[Markup] = field(default_factory=list)


def _read_json(path: Path) -> Any:
    """The content of a JSON file, or None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"Asked to report {path}, found no valid JSON: {error}. Remove or repair the file.") from error


def _read_metrics(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"Asked to report {path}, found no JSON in line {number}: {error}. Repair the line."
            ) from error
    return rows


def _points(rows: Sequence[Row], key: str) -> Points:
    """Steps and finite values of one metric; a row without a step counts by its place."""
    points = []
    for place, row in enumerate(rows, start=1):
        value = row.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((float(row.get("step", place)), float(value)))
    return points


def _sample_points(folder: Path) -> dict[str, Points]:
    """Per step the mean gold score and the share of flattering replies among the samples.

    The gold score is the column `gold` where there is one, else it is computed. Samples whose prompt is no
    request of the grammar, as when the run was not the demonstration's, have neither.
    """
    gold: dict[float, list[float]] = defaultdict(list)
    flattery: dict[float, list[float]] = defaultdict(list)
    for path in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            score = row.get("gold")
            if score is None:
                try:
                    score = gold_score(row["prompt"], row["completion"]).total
                except DataError:
                    continue  # the prompt is no request of the grammar
            gold[float(row["step"])].append(float(score))
            flattery[float(row["step"])].append(float(is_flattering(row["completion"])))
    return {
        name: [(step, sum(values) / len(values)) for step, values in sorted(series.items())]
        for name, series in (("gold", gold), ("flattery", flattery))
    }


def _draw(name: str, title: str, paint: Callable[[Axes], None], size: tuple[float, float] = (4.6, 2.9)) -> Markup:
    """An SVG drawing for the page, its ink in the page's text colour."""
    style: Any = {  # its type is a literal of every parameter name
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "font.family": "sans-serif",
        "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK,
        "xtick.color": _INK, "ytick.color": _INK,
        "axes.spines.top": False, "axes.grid": True, "grid.alpha": 0.15, "grid.color": _INK,
        "legend.frameon": False, "legend.fontsize": 8, "axes.titlesize": 10, "axes.titleweight": "bold",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left")
        paint(axes)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    return Markup(text[text.index("<svg") :].replace(_INK, "currentColor"))


def _draw_chart(name: str, chart: _Chart, series: Mapping[str, Points], ceiling: float | None) -> Markup | None:
    """The chart of the curves that exist, or None where none does."""
    curves = [(line, series[line.key]) for line in chart.lines if series.get(line.key)]
    if not curves:
        return None

    def paint(axes: Axes) -> None:
        handles = []
        right = axes.twinx() if {line.right for line, _ in curves} == {True, False} else axes
        for (line, points), colour in zip(curves, _COLOURS, strict=False):
            target = right if line.right else axes
            marker = "o" if line.marks or len(points) == 1 else None
            handles += target.plot(
                *zip(*points, strict=True), color=colour, label=line.label, marker=marker, markersize=3.5
            )
            if right is not axes:
                target.set_ylabel(line.label, color=colour)
        if right is not axes:
            right.spines["right"].set_visible(True)
            right.grid(False)
        if chart.ceiling and ceiling is not None:
            handles.append(axes.axhline(ceiling, color=_INK, linestyle=":", label="label-noise ceiling"))
        axes.set_xlabel("step")
        if len(handles) > 1:
            axes.legend(handles=handles, loc="best")

    return _draw(name, chart.title, paint)


def _find_bins(evaluation: Any) -> list[Row]:
    """The first list of rows with `confidence` and `accuracy` in the evaluation, empty bins left out."""
    if isinstance(evaluation, Mapping):
        for value in evaluation.values():
            if found := _find_bins(value):
                return found
    elif isinstance(evaluation, list):
        rows = [row for row in evaluation if isinstance(row, Mapping) and row.keys() >= {"confidence", "accuracy"}]
        return [row for row in rows if row["confidence"] is not None and row["accuracy"] is not None]
    return []


def _draw_reliability(evaluation: Any) -> Markup | None:
    """Accuracy against confidence, each bin's area by its count; None where the evaluation has no bins."""
    bins = _find_bins(evaluation)
    if not bins:
        return None
    most = max(row.get("count", 1) for row in bins)

    def paint(axes: Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=_INK, linestyle=":", label="calibrated")
        axes.scatter(
            [row["confidence"] for row in bins],
            [row["accuracy"] for row in bins],
            s=[15 + 120 * row.get("count", 1) / most for row in bins],
            color=_COLOURS[0],
            alpha=0.8,
            label="held-out pairs",
        )
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.legend(loc="best")

    return _draw("reliability", "Reliability", paint)


def _draw_timeline(folder: Path) -> Markup | None:
    """Who worked when in the last iteration; None where no process left spans."""
    if not (folder / TRACE).is_dir():
        return None
    timeline = read_timeline(folder)
    known = iterations(timeline)
    if not known:
        return None
    last = known[max(known)]

    def paint(axes: Axes) -> None:
        axes.grid(False)
        paint_timeline(axes, timeline, last.start, last.end)

    return _draw("timeline", f"Iteration {max(known)}: who works when", paint, size=(6.4, 2.9))


def _flatten(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """Names joined by dots, and values, of a nested mapping."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_format(item) for item in value)
    return "-" if value is None else str(value)


def _text_of(prompt: Any) -> str:
    """A prompt as text: its last message where it is a conversation."""
    return str(prompt[-1]["content"]) if isinstance(prompt, list) else str(prompt)


def _section(stage: _Stage, run_dir: Path, ceiling: float | None) -> _Section:
    folder = run_dir / stage.folder
    rows = _read_metrics(folder / "metrics.jsonl")
    section = _Section(stage.title, stage.story, found=bool(rows))
    series = {line.key: _points(rows, line.key) for chart in stage.charts for line in chart.lines}
    series |= {name: points for name, points in _sample_points(folder / "samples").items() if points}
    drawings = [
        _draw_chart(f"{stage.folder}-{number}", chart, series, ceiling) for number, chart in enumerate(stage.charts)
    ]
    if stage.folder == "reward":
        drawings.append(_draw_reliability(_read_json(folder / "evaluation.json")))
    if stage.folder == "ppo":
        drawings.append(_draw_timeline(folder))
    section.drawings = [drawing for drawing in drawings if drawing is not None]
    section.found = bool(section.drawings)
    return section


def write_report(run_dir: str | Path, out_html: str | Path) -> None:
    """Write the page of a run.

    Reads what there is of `<stage>/metrics.jsonl` for the stages sft, reward, ppo and dpo,
    `reward/evaluation.json`, `ppo/samples/*.parquet`, `summary.json` and `replies.json`, a list of objects
    with `prompt`, `before`, `after`, `score_before`, `score_after`, `gold_before` and `gold_after`.

    Args:
        run_dir: folder of the run.
        out_html: the page to write, replaced at once if it is there.

    Raises:
        DataError: the folder does not exist, or a file in it is malformed.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(f"Asked to report the run {run_dir}, found no such folder. Give a run's folder.")
    summary = list(_flatten(_read_json(run_dir / "summary.json") or {}))
    ceilings = [value for name, value in summary if name.endswith("label_noise_ceiling")]
    sections = [_section(stage, run_dir, ceilings[0] if ceilings else None) for stage in _STAGES]
    replies = [
        {**row, "prompt": _text_of(row["prompt"])}
        for row in (_read_json(run_dir / "replies.json") or [])[:_MAX_REPLIES]
    ]
    environment = Environment(loader=PackageLoader("rlhf_ray.demo", "."), autoescape=True, trim_blocks=True)
    environment.filters["number"] = _format
    page = environment.get_template("report.html.j2").render(
        # The comparison with DPO is optional: a run without it is complete.
        sections=[section for section in sections if section.found or section.title != "DPO"],
        summary=summary,
        replies=replies,
        cards=_cards(summary),
    )
    write_text(Path(out_html), page)


def _cards(summary: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    """The figures that head the page: the first of each kind that the summary holds."""
    wanted = {
        "win_rate": "gold win rate against the SFT model",
        "reward_accuracy": "reward-model accuracy, held out",
        "label_noise_ceiling": "accuracy the label noise allows",
        "kl": "KL to the SFT model, nats a reply",
    }
    cards = []
    for key, label in wanted.items():
        values = [v for name, v in summary if name.split(".")[-1] == key and isinstance(v, int | float)]
        if values:
            cards.append((label, f"{values[0]:.2f}" if key == "kl" else f"{values[0]:.1%}"))
    return cards
