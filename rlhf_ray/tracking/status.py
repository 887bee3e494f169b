"""What every process of a run does now, from the files that they write once a second (`tracking/activity.py`)."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from rlhf_ray.errors import StageError
from rlhf_ray.tracking.activity import NOW, NOW_EVERY_S, TRACE

# After so long without a word a process is said to be silent: it ended, or it hangs.
SILENT_S = 10 * NOW_EVERY_S


@dataclass(frozen=True)
class ProcessStatus:
    """One process.

    Attributes:
        doing: what it does, in a word, or "idle".
        seconds: for how long.
        silent: seconds since its last word.
        version: of the policy weights that it holds; None where it holds none.
        queue: requests handed to it and not answered.
        tokens_per_second: of its last call or so far in the one under way, 0 a while after it; None before the first.
        tokens: in all.
        responses: in all.
    """

    name: str
    doing: str
    seconds: float
    silent: float
    version: int | None
    queue: int
    tokens_per_second: float | None
    tokens: int
    responses: int

    @property
    def is_silent(self) -> bool:
        """Whether it ended or hangs."""
        return self.silent > SILENT_S


def read_status(run_dir: Path, now: float | None = None) -> list[ProcessStatus]:
    """The processes of a run, by name.

    Args:
        run_dir: its directory.
        now: seconds since the epoch; None asks the clock, which should agree with those of the run's nodes.

    Raises:
        StageError: the directory holds no run that has begun.
    """
    found = statuses(run_dir, now)
    if not found:
        raise StageError(f"{run_dir} holds no word of any process ({TRACE}/*{NOW}); name the directory of a run")
    return found


def statuses(run_dir: Path, now: float | None = None) -> list[ProcessStatus]:
    """As `read_status`, and empty where no process has said anything."""
    now = time.time() if now is None else now
    found = (_read(file, now) for file in sorted((run_dir / TRACE).glob(f"*{NOW}")))
    return [one for one in found if one is not None]


def forget(run_dir: Path, name: str = "*") -> None:
    """Say no more of a process that has left; without a name, of all processes of an earlier start."""
    for file in (run_dir / TRACE).glob(f"{name}{NOW}"):
        file.unlink(missing_ok=True)


def _read(file: Path, now: float) -> ProcessStatus | None:
    try:
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):  # just removed, or cut short by a full disk
        return None
    return ProcessStatus(
        name=file.name.removesuffix(NOW),
        doing=told["doing"],
        seconds=max(0.0, now - told["since"]),
        silent=max(0.0, now - told["told"]),
        version=told.get("rlhf_weight_version"),
        queue=told.get("rlhf_queue", 0),
        tokens_per_second=told.get("rlhf_tokens_per_second"),
        tokens=round(told.get("rlhf_tokens_total", 0)),
        responses=round(told.get("rlhf_responses_total", 0)),
    )


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """The last line of the run's metrics; empty before the first."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            return json.loads(line)
        except json.JSONDecodeError:  # being written
            continue
    return {}


def table(processes: list[ProcessStatus]) -> Table:
    """A row a process; one that has not been heard of lately is marked."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("process", no_wrap=True)
    shown.add_column("does", no_wrap=True)
    for name in ("for", "weights", "queue", "tokens/s", "tokens", "responses"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in processes:
        shown.add_row(
            one.name,
            f"silent (was: {one.doing})" if one.is_silent else one.doing,
            duration(one.silent if one.is_silent else one.seconds),
            "" if one.version is None else f"{one.version:g}",
            str(one.queue),
            "" if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}",
            f"{one.tokens:,}" if one.tokens else "",
            f"{one.responses:,}" if one.responses else "",
            style="red" if one.is_silent else None,
        )
    return shown


def duration(seconds: float) -> str:
    """Seconds as people write them: 12 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
