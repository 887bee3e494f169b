"""Whether what a run left behind accounts for every prompt, every token's weights and every checkpoint. Starts nothing.

A PPO run writes a row for each response of each iteration it finished (`samples/`), and each step of its batches into
its ledger (`driver/ledger.py`); the two must say the same. A run that is older than the ledger has the tables alone.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_ray.config import PPOConfig
from rlhf_ray.config.load import load_any
from rlhf_ray.driver.checkpoint import STATE, checkpoint_folders, damage, step_of
from rlhf_ray.driver.ledger import ABANDONED, EXCLUDED, REPLACED, STARTED, WAY, digest, ledger_rows
from rlhf_ray.driver.rollouts import is_spare
from rlhf_ray.errors import StageError, shortened
from rlhf_ray.tracking.rundir import metric_rows

MOST_NAMES = 3
# The steps that may stand before each step of a batch in the ledger; None: the batch is new, or was abandoned.
FOLLOWS: dict[str, tuple[str | None, ...]] = {
    "drawn": (None,),
    "replaced": ("scored",),
    "dispatched": ("drawn", "replaced"),
    "completed": ("dispatched",),
    "scored": ("completed",),
    "excluded": ("scored",),
    "trained": ("scored", "excluded"),
}
COLUMNS = ["uid", "sample", "score", "weight_version", "oldest_version"]


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        subject: what, in a word.
        found: what was counted.
        problem: what is wrong with it, in words; None where it is right.
    """

    subject: str
    found: str
    problem: str | None = None


def verify(run_dir: Path) -> list[Finding]:
    """Check a run's directory; the run may be under way, finished or broken off.

    Raises:
        StageError: there is no run.
        ConfigError: its configuration cannot be read.
    """
    if not (run_dir / "config.yaml").is_file():
        raise StageError(f"{run_dir} holds no run (no config.yaml); name the directory of a run")
    config = load_any(run_dir / "config.yaml", [])
    # Before the metrics, which a run under way writes first.
    checkpoints = checkpoint_folders(run_dir / "checkpoints")
    rows = [row for _, row in metric_rows(run_dir / "metrics.jsonl")]
    damages = {folder: damage(folder) for folder in checkpoints}
    findings = [_metrics(rows), *_checkpoints(damages, len(rows))]
    if not isinstance(config, PPOConfig):
        return findings
    try:
        tables = list(_tables(run_dir, len(rows)))
    except (OSError, pa.ArrowInvalid) as error:
        return [*findings, Finding("samples", "a table that cannot be read", str(error))]
    whole = [folder for folder, problem in damages.items() if problem is None]
    return [
        *findings,
        _samples(config, tables),
        _draws(_num_prompts(run_dir, whole), tables),
        _versions(config, tables),
        *_ledger(run_dir / "ledger.jsonl", tables),
    ]


def _metrics(rows: list[dict[str, Any]]) -> Finding:
    found = f"{len(rows)} steps"
    for expected, row in enumerate(rows):
        if row["step"] != expected:
            return Finding("metrics", found, f"step {row['step']} stands where step {expected} should")
    return Finding("metrics", found)


def _checkpoints(damages: dict[Path, str | None], steps: int) -> Iterator[Finding]:
    for folder, problem in damages.items():
        step = step_of(folder)
        if problem is not None and not folder.exists():
            continue  # an old one, that the run removed meanwhile
        if problem is None and step > steps:
            problem = f"it is of {step} steps, and the metrics know {steps}"
        yield Finding(f"checkpoint {folder.name}", "whole" if problem is None else "damaged", problem)


def _tables(run_dir: Path, steps: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of each step that the metrics know; a later table is of a step that did not end."""
    for step in range(steps):
        file = run_dir / "samples" / f"step_{step:06d}.parquet"
        try:
            yield pq.read_table(file, columns=COLUMNS).to_pylist() if file.is_file() else []
        except pa.ArrowInvalid as error:
            raise pa.ArrowInvalid(f"{file}: {error}") from error


def _samples(config: PPOConfig, tables: list[list[dict[str, Any]]]) -> Finding:
    """Every prompt of an iteration has each of its samples once, and those that failed another in their place."""
    wanted = config.ppo.prompts_per_iteration
    samples = set(range(config.rollout.samples_per_prompt))
    found = f"{sum(map(len, tables))} responses"
    for step, rows in enumerate(tables):
        of_prompt: dict[str, list[int]] = {}
        spares = [row["uid"] for row in rows if is_spare(row["uid"])]
        failed = sum(row["score"] is None for row in rows)
        if len(set(spares)) != len(spares) or len(spares) != min(failed, config.ppo.spare_prompts):
            problem = f"step {step}: {len(spares)} responses took the place of {failed} that have no score"
            return Finding("responses", found, f"{problem}, of {config.ppo.spare_prompts} prompts set aside")
        for row in _of_epochs(rows):
            of_prompt.setdefault(row["uid"], []).append(row["sample"])
        if len(of_prompt) != wanted:
            return Finding("responses", found, f"step {step} has {len(of_prompt)} prompts, and {wanted} were drawn")
        for uid, numbers in of_prompt.items():
            if sorted(numbers) != sorted(samples):
                said = ", ".join(map(str, sorted(numbers)))
                problem = f"step {step}, prompt {uid}: samples {said}, and each of {len(samples)} should be there once"
                return Finding("responses", found, problem)
    return Finding("responses", found)


def _draws(num_prompts: int | None, tables: list[list[dict[str, Any]]]) -> Finding:
    """Every prompt is drawn once an epoch: after t draws of n prompts, t modulo n of them once more than the others."""
    drawn: Counter[str] = Counter()
    how_many = Counter({0: num_prompts or 0})  # prompts that were drawn so often
    for step, rows in enumerate(tables):
        for uid in dict.fromkeys(row["uid"] for row in _of_epochs(rows)):
            prompt = uid.partition("+")[0]  # one that comes twice in an iteration has a number after it
            how_many[drawn[prompt]] -= 1
            drawn[prompt] += 1
            how_many[drawn[prompt]] += 1
        if num_prompts is None:
            continue
        epoch, more = divmod(drawn.total(), num_prompts)
        # Of all that were drawn, `more` came epoch + 1 times, and every one of the others epoch times.
        if how_many[epoch + 1] != more or how_many[epoch] != num_prompts - more:
            often = max(drawn.values())
            names = ", ".join([prompt for prompt, count in drawn.items() if count == often][:MOST_NAMES])
            problem = (
                f"by step {step} {drawn.total()} prompts were drawn of {num_prompts}, which is {epoch} epochs and "
                f"{more} prompts, and {names} came {often} times"
            )
            return Finding("prompts", f"{len(drawn)} prompts", problem)
    if num_prompts is None:
        return Finding("prompts", f"{len(drawn)} of an unknown number (no whole checkpoint, no summary): not checked")
    return Finding("prompts", f"{drawn.total()} drawn of {num_prompts}, each once an epoch")


def _of_epochs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of prompts that the epochs are made of."""
    return [row for row in rows if not is_spare(row["uid"])]


def _num_prompts(run_dir: Path, whole: list[Path]) -> int | None:
    """How many prompts the run draws from, as its summary or a whole checkpoint says."""
    summary = run_dir / "summary.json"
    if summary.is_file():
        return int(json.loads(summary.read_text(encoding="utf-8"))["prompts"])
    for folder in reversed(whole):
        with suppress(FileNotFoundError):  # the run removed it meanwhile
            return int(json.loads((folder / STATE).read_text(encoding="utf-8"))["order"]["num_items"])
    return None


def _versions(config: PPOConfig, tables: list[list[dict[str, Any]]]) -> Finding:
    """No token is older than allowed: one update an iteration after the warm-up, and `ppo.max_staleness` back."""
    bound = config.ppo.max_staleness
    for step, rows in enumerate(tables):
        current = max(0, step - config.critic.warmup_iterations)
        for row in rows:
            if not current - bound <= row["oldest_version"] <= row["weight_version"] <= current:
                have = " to ".join(str(version) for version in sorted({row["oldest_version"], row["weight_version"]}))
                allowed = f"{max(0, current - bound)} to {current}" if bound else str(current)
                problem = f"step {step}, prompt {row['uid']}: tokens of version {have}, and {allowed} is allowed"
                return Finding("weights", f"{len(tables)} steps", problem)
    allowed = f"at most {bound} updates older than" if bound else "from"
    return Finding("weights", f"{len(tables)} steps, each sampled {allowed} the weights of its beginning")


def _ledger(path: Path, tables: list[list[dict[str, Any]]]) -> list[Finding]:
    """Each batch went the whole way, step by step, and the tables hold the very samples that it ended with."""
    if not path.exists():
        return []  # a run that is older than the ledger
    rows = [row for _, row in ledger_rows(path)]
    found = f"{len(rows)} lines"
    batches: dict[int, list[dict[str, Any]]] = {}  # iteration -> the steps that it has taken
    before = None
    for number, row in enumerate(rows, start=1):
        problem = _misstep(batches, row, before)
        if problem is not None:
            return [Finding("ledger", found, f"line {number}: iteration {row['iteration']} {problem}")]
        before = row["event"]
    first = rows[0]["iteration"] if rows else 0
    for step, samples in enumerate(tables[first:], start=first):
        for event, chosen in (
            (WAY[-1], [row for row in samples if row.get("score") is not None]),
            (EXCLUDED, [row for row in samples if row.get("score") is None]),
        ):
            written = [row["digest"] for row in batches.get(step, []) if row["event"] == event]
            if written != [digest((row["uid"], row["sample"]) for row in chosen)] * bool(chosen):
                problem = f"step {step}: the {len(chosen)} samples of its table are not those that were {event}"
                return [Finding("ledger", found, problem)]
    trained = sum(row["count"] for steps in batches.values() for row in steps if row["event"] == WAY[-1])
    again = sum(row["event"] == ABANDONED for row in rows)
    return [
        Finding("ledger", f"{found}, {trained} samples trained once each, {again} batches abandoned and drawn again")
    ]


def _misstep(batches: dict[int, list[dict[str, Any]]], row: dict[str, Any], before: str | None) -> str | None:
    """Takes a line of the ledger into the steps of its batch; says in words what the line cannot follow on."""
    event, steps = row["event"], batches.setdefault(row["iteration"], [])
    last = steps[-1]["event"] if steps else None
    if event == STARTED:
        return None
    if before is None:
        return f"was {shortened(event, 50)} before the run was started"
    if event == ABANDONED:
        if last is None or before not in (STARTED, ABANDONED):
            return f"was abandoned, and {'was not drawn' if last is None else 'the run went on'}"
        steps.clear()
        return None
    if last not in FOLLOWS.get(event, ()):
        return f"was {shortened(event, 50)} when it was {last or 'not drawn'}"
    if type(row.get("count")) is not int or type(row.get("digest")) is not str:
        return f"was {event}, and the line names no samples"
    steps.append(row)
    drawn = [one for one in steps if one["event"] in (WAY[0], REPLACED)]
    if event in WAY[1:-1] and row["digest"] != drawn[-1]["digest"]:
        return f"was {event} with other samples than were drawn"
    ended = [one["count"] for one in steps if one["event"] in (EXCLUDED, WAY[-1])]
    count = sum(one["count"] for one in drawn)
    if event == WAY[-1] and sum(ended) != count:
        return f"was trained, and of {count} samples {sum(ended)} were trained or excluded"
    return None
