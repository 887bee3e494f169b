"""What stale samples do to learning: PPO of the demonstration at several `ppo.max_staleness`, corrected and not.

    python benchmarks/staleness.py                             # all runs, then the result and its drawing
    python benchmarks/staleness.py shipped-s4-plain-seed0 ...  # only these, then what all finished ones say

Data, SFT and reward model are made once. A run that is finished is kept, one that was stopped goes on. Runs that the
stored result has and the folder does not stay in it, where they began from the same models. The seed of a run is that
of its sampling and its order of prompts; data and models before PPO are the same in all.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from matplotlib.figure import Figure

from rlhf_ray.bench.report import circumstances
from rlhf_ray.config import PipelineConfig
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.data import demonstration_sequences, read_rows
from rlhf_ray.data.readers import Row, Rows
from rlhf_ray.demo.data import DemoFiles, write_demo_data
from rlhf_ray.demo.gold import gold_score
from rlhf_ray.demo.run import demo_config, learned_scores, sample_replies, start_scorer
from rlhf_ray.models.loading import load_causal_lm, load_tokenizer
from rlhf_ray.models.reading import TokenLogprobs
from rlhf_ray.placement.groups import inventory
from rlhf_ray.runtime.cluster import connection
from rlhf_ray.runtime.remote import get
from rlhf_ray.scoring.actors import ModelSpec, read_all
from rlhf_ray.stages.pipeline import run_pipeline
from rlhf_ray.stages.ppo import train_ppo
from rlhf_ray.tracking.rundir import write_text

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"
RESULT = ROOT / "benchmarks" / "results" / "staleness.json"
DRAWING = ROOT / "docs" / "staleness.svg"

# What each setting changes in the demonstration's `ppo` section.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "shipped": {},
    "fast": {"policy": {"learning_rate": 5e-4}, "ppo": {"minibatches": 4}},
}
STALENESS = (0, 1, 2, 4)
SEEDS = (0, 1)
HELD_OUT = 1024
# The first iterations, in which queues fill and the critic warms up, say nothing about how stale a run is.
SETTLED = 10
LAST = 10

# What a curve is of, and the metric it is read from.
METRICS = {
    "score": "objective/scores",
    "kl": "objective/kl",
    "staleness_mean": "sampling/staleness/mean",
    "staleness_max": "sampling/staleness/max",
    "off_policy_kl": "sampling/kl",
    "logp_difference": "sampling/sampling_logp_difference/mean",
    "truncated": "sampling/importance_weight/truncated",
    "masked": "sampling/importance_weight/masked",
    "clipped": "policy/clipfrac_avg",
}


@dataclass(frozen=True)
class Case:
    """One run of the comparison; `corrected` is no question where nothing is stale."""

    setting: str
    staleness: int
    corrected: bool
    seed: int

    @property
    def kind(self) -> str:
        """What runs of all seeds have in common."""
        correction = ("-corrected" if self.corrected else "-plain") if self.staleness else ""
        return f"{self.setting}-s{self.staleness}{correction}"

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind}-seed{self.seed}"


def all_cases() -> list[Case]:
    """Every run, those of the first seed first."""
    return [
        Case(setting, staleness, corrected, seed)
        for seed in SEEDS
        for setting in SETTINGS
        for staleness in STALENESS
        for corrected in ((True, False) if staleness else (True,))
    ]


def ppo_config(base: PipelineConfig, models: dict[str, Path], case: Case, folder: Path) -> PPOConfig:
    """The demonstration's PPO as a case has it."""
    values = base.stage_config("ppo", {name: str(models[name]) for name in ("sft", "reward")}).model_dump()
    for section, changes in SETTINGS[case.setting].items():
        values[section] |= changes
    values["run"] |= {"dir": str(folder), "seed": case.seed}
    values["ppo"] |= {"max_staleness": case.staleness}
    if not case.corrected:
        values["ppo"] |= {"importance_cap": None}
    return PPOConfig.model_validate(values)


def read_curves(run: Path, warmup: int) -> dict[str, list[float | None]]:
    """What happened at each iteration of a run.

    Args:
        run: its folder.
        warmup: iterations at the start that train the critic alone.

    Returns:
        Lists with a value an iteration: those of `METRICS`, None where a run has no such metric; `gold`, the mean gold
        score of the responses; and `updates`, how many the weights had that sampled them, on average over tokens.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curves: dict[str, list[float | None]] = {name: [row.get(key) for row in rows] for name, key in METRICS.items()}
    curves["updates"] = [max(0, row["step"] - warmup) - row[METRICS["staleness_mean"]] for row in rows]
    curves["gold"] = [gold_of_step(run, row["step"]) for row in rows]
    return curves


def gold_of_step(run: Path, step: int) -> float:
    """The mean gold score of an iteration's responses."""
    table = pq.read_table(run / "samples" / f"step_{step:06d}.parquet", columns=["prompt", "completion"])
    return fmean(gold_score(row["prompt"], row["completion"]).total for row in table.to_pylist())


def evaluate(
    base: PipelineConfig, files: DemoFiles, models: dict[str, Path], policy: Path, kl: bool = True
) -> dict[str, float]:
    """A policy's replies to the held-out prompts: their gold and learned scores, and the KL divergence from SFT."""
    prompts = [row.data["prompt"][0]["content"] for row in read_rows(str(files.prompts_test))]
    replies = sample_replies(base, files, {"before": policy})
    scorer, loaded = start_scorer(models["reward"])
    get(loaded, "reward model: start-up", 300.0)
    (scores,) = learned_scores(scorer, models["reward"], prompts, replies).values()
    (texts,) = replies.values()
    gold = [gold_score(prompt, text).total for prompt, text in zip(prompts, texts, strict=True)]
    found = {"gold": fmean(gold), "score": fmean(scores)}
    return found | ({"kl": kl_of_replies(policy, models["sft"], prompts, texts)} if kl else {})


def kl_of_replies(policy: Path, reference: Path, prompts: Sequence[str], replies: Sequence[str]) -> float:
    """Estimate of KL(policy || reference) in nats a reply, from the policy's own replies.

    What a run logs as `objective/kl` is of replies that older weights sampled, where they are stale.
    """
    dialogues = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    rows = Rows([Row({"messages": messages}, f"reply {index}") for index, messages in enumerate(dialogues)])
    sequences, _ = demonstration_sequences(rows, load_tokenizer(str(reference)), 128, "error")
    summed = []
    for folder in (policy, reference):
        spec = ModelSpec(str(folder), "fp32", token_budget=4096, gpu=False)
        read = read_all(load_causal_lm(spec.path, spec.dtype).eval(), sequences, TokenLogprobs(), spec)
        summed.append(fmean(float(logprobs.sum()) for logprobs in read))
    return summed[0] - summed[1]


def summarize_curves(curves: dict[str, list[float | None]]) -> dict[str, float | None]:
    """One number a curve: staleness and mismatch once the queue has filled, and scores of the last iterations."""
    found: dict[str, float | None] = {}
    for name, values in curves.items():
        part = values[-LAST:] if name in ("gold", "score", "kl") else values[SETTLED:]
        known = [value for value in part if value is not None]
        found[name] = None if not known else max(known) if name.endswith("_max") else fmean(known)
    return found


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Over the seeds: mean, least and largest; None where a seed lacks it."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return {"mean": fmean(known), "min": min(known), "max": max(known)}


def table_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind of run, over its seeds, in the order in which they come first."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        kinds.setdefault(run["kind"], []).append(run)
    rows = []
    for kind, members in kinds.items():
        curves = [summarize_curves(run["curves"]) for run in members]
        row: dict[str, Any] = {key: members[0][key] for key in ("setting", "staleness", "corrected")}
        row |= {"kind": kind, "seeds": [run["seed"] for run in members]}
        row["held_out"] = {name: spread([run["held_out"][name] for run in members]) for name in members[0]["held_out"]}
        row["training"] = {name: spread([one[name] for one in curves]) for name in curves[0]}
        rows.append(row)
    return rows


def smoothed(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Means of `width` neighbours, of x and of y."""
    windows = [points[start : start + width] for start in range(len(points) - width + 1)]
    return [(fmean(x for x, _ in window), fmean(y for _, y in window)) for window in windows]


def mean_curve(runs: Sequence[dict[str, Any]], x: str | None, y: str, width: int = 3) -> list[tuple[float, float]]:
    """A curve's mean over runs of one kind, iteration by iteration, smoothed."""
    points = []
    for step in range(min(len(run["curves"][y]) for run in runs)):
        values = [run["curves"][y][step] for run in runs]
        if None not in values:
            points.append((float(step) if x is None else fmean(run["curves"][x][step] for run in runs), fmean(values)))
    return smoothed(points, width)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """A row of panels for each setting: gold score, how far off-policy the samples were, and how stale."""
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    panels = (
        ("updates", "gold", "updates of the weights that sampled", "gold score of the responses"),
        (None, "off_policy_kl", "iteration", "off-policy KL, nats a token"),
        (None, "staleness_mean", "iteration", "updates behind, mean"),
    )
    colours = dict(zip(STALENESS, ("#111827", "#0ea5e9", "#f59e0b", "#dc2626"), strict=True))
    figure = Figure(figsize=(11, 0.8 + 3 * len(settings)), layout="constrained")
    grid = figure.subplots(len(settings), len(panels), squeeze=False)
    for setting, row in zip(settings, grid, strict=True):
        for axes, (x, y, x_label, y_label) in zip(row, panels, strict=True):
            for kind in dict.fromkeys(run["kind"] for run in runs if run["setting"] == setting):
                members = [run for run in runs if run["kind"] == kind]
                staleness, corrected = members[0]["staleness"], members[0]["corrected"]
                label = f"{staleness}" + ("" if not staleness else ", corrected" if corrected else ", not corrected")
                points = mean_curve(members, x, y)
                axes.plot(
                    *zip(*points, strict=True),
                    color=colours[staleness],
                    linestyle="-" if corrected else "--",
                    linewidth=1.4,
                    label=label,
                )
            axes.set(xlabel=x_label, ylabel=y_label)
            axes.grid(color="#e5e7eb", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_title(f"setting: {setting}", loc="left", fontsize=10)
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(lines.values(), lines, title="max_staleness", loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def report(runs: Sequence[dict[str, Any]], sft: dict[str, float], around: dict[str, Any]) -> str:
    """The result as JSON, a run a line."""
    head = {
        "benchmark": "staleness",
        **around,
        "settings": SETTINGS,
        "held_out_prompts": HELD_OUT,
        "settled": SETTLED,
        "last": LAST,
        "sft": sft,
        "rows": table_rows(runs),
    }
    lines = ",\n".join(json.dumps(run) for run in runs)
    return json.dumps(head, indent=1).removesuffix("\n}") + f',\n "runs": [\n{lines}\n ]\n}}\n'


def rounded(value: Any) -> Any:
    """Floats with five digits: a curve needs no more."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def evaluated(path: Path, *arguments: Any, **options: Any) -> dict[str, float]:
    """The evaluation that is kept at `path`, made now if there is none."""
    if not path.is_file():
        write_text(path, json.dumps(evaluate(*arguments, **options)) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def finished(folder: Path, warmup: int, commit: str) -> dict[str, dict[str, Any]]:
    """What is known of each run of the folder that was made and evaluated, by its name."""
    return {
        case.name: rounded(
            vars(case)
            | {
                "kind": case.kind,
                "commit": commit,
                "held_out": json.loads((folder / case.name / "held_out.json").read_text(encoding="utf-8")),
                "curves": read_curves(folder / case.name, warmup),
            }
        )
        for case in all_cases()
        if (folder / case.name / "held_out.json").is_file()
    }


def stored(sft: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The runs of the stored result, by name; none where they began from another SFT model or had other settings."""
    if not RESULT.is_file():
        return {}
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    if (result["sft"], result["settings"]) != (sft, SETTINGS):
        print(f"{RESULT} is of other models or settings and is made anew")
        return {}
    names = [field.name for field in fields(Case)]
    return {Case(**{name: run[name] for name in names}).name: run for run in result["runs"]}


def main() -> None:
    """Run what is asked for, then write what all finished runs say."""
    known = {case.name: case for case in all_cases()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"runs to do, all without: {', '.join(known)}")
    parser.add_argument("--folder", type=Path, default=Path("runs/staleness"), help="of data and runs (%(default)s)")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"no such run: {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    folder: Path = options.folder
    files = write_demo_data(folder / "data", 0, test_prompts=HELD_OUT)
    base = demo_config(CONFIG, folder, 0, files, few_labels=False)
    assert base.ppo is not None
    with connection(base.run.ray_address):
        around = circumstances(inventory()) | {"command": shlex.join(["python", *sys.argv])}
        models = run_pipeline(base.model_copy(update={"stages": ["sft", "reward"]}))
        sft = evaluated(folder / "sft" / "held_out.json", base, files, models, models["sft"], kl=False)
        for name in options.names or known:
            policy = train_ppo(ppo_config(base, models, known[name], folder / name))
            evaluated(folder / name / "held_out.json", base, files, models, policy)
            made = stored(rounded(sft)) | finished(folder, base.ppo.critic.warmup_iterations, around["commit"])
            runs = [made[case] for case in known if case in made]
            write_text(RESULT, report(runs, rounded(sft), around))
            draw(runs, DRAWING)


if __name__ == "__main__":
    main()
