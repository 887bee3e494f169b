"""What every process of a run was doing when something gave no answer: a report, written before anything is ended."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_ray.errors import Stalled
from rlhf_ray.tracking.activity import NOW, TRACE, group_of
from rlhf_ray.tracking.rundir import write_text
from rlhf_ray.tracking.status import ProcessStatus, duration, statuses, table

FOLDER = "stalls"
LOG_LINES = 20
TRAINERS = ("group", "policy", "critic")  # whose ranks compute together
TRANSFER = "transfer"  # the span of both ends of one
DRIVER = "driver"
# Whom the driver waits for in its spans; in others, for whoever it is.
SAMPLING = ("rollout", "reference", "reward", "critic")
WAITS = {
    "wait": SAMPLING,
    "generate": SAMPLING,
    "advantages": ("policy", "critic"),
    "train": ("policy", "critic"),
    TRANSFER: ("policy", "rollout"),
}
STACK_TIMEOUT_S = 20.0


@contextmanager
def reporting_stalls(run_dir: Path) -> Iterator[None]:
    """A `Stalled` that leaves the block names a report, written while the processes it is about are still there."""
    try:
        yield
    except Stalled as error:
        try:
            report = f"What every process was doing: {write_report(run_dir, str(error))}"
        except Exception as problem:  # what was to be reported counts more
            report = f"What every process was doing could not be written down: {problem}"
        raise Stalled(f"{error}\n{report}") from error


def write_report(run_dir: Path, problem: str, hung: str | None = None) -> Path:
    """Write what the processes of a run do now: all in a table, then one by one.

    Each comes with the last lines of its log and, where it runs on this host and py-spy may look into it, the stack of
    each of its threads.

    Args:
        run_dir: the run's directory.
        problem: what is reported.
        hung: the process that is to blame; None where the driver has waited too long for several.

    Returns:
        The file, `stalls/<time>.txt` in the run's directory.
    """
    processes = statuses(run_dir)
    console = Console(width=160, highlight=False)
    with console.capture() as captured:
        console.print(table(processes))
    parts = [problem, f"Waiting for it: {'; '.join(_waiting(hung, processes)) or 'nobody'}", captured.get()]
    parts += [_about(run_dir, one) for one in processes]
    path = run_dir / FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}.txt"
    path.parent.mkdir(exist_ok=True)
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _waiting(hung: str | None, processes: list[ProcessStatus]) -> list[str]:
    """Who cannot go on without a process, and what it is about, longest first.

    The driver waits for those that its step is of; the ranks of a trainer compute together, and send weights to engines
    that take them; an engine needs its parts.
    """
    waiting = [one for one in processes if one.doing != "idle" and not one.is_silent and _waits(one, hung)]
    waiting.sort(key=lambda one: -one.seconds)
    return [f"{one.name}, in `{one.doing}` for {duration(one.seconds)}" for one in waiting]


def _waits(one: ProcessStatus, hung: str | None) -> bool:
    if hung is None:  # a wait of the driver's has passed its limit
        return one.name == DRIVER
    group, own = group_of(hung), group_of(one.name)
    if one.name == hung:
        return False
    if one.name == DRIVER:
        return group in WAITS.get(one.doing, (group,))
    together = own == group and (group in TRAINERS or hung.startswith(f"{one.name}-"))
    return together or (one.doing == TRANSFER and {own, group} == {"policy", "rollout"})


def _about(run_dir: Path, one: ProcessStatus) -> str:
    told: dict[str, Any] = json.loads((run_dir / TRACE / f"{one.name}{NOW}").read_text(encoding="utf-8"))
    state = f"silent for {duration(one.silent)}, before that " if one.is_silent else ""
    where = f"process {told['process']} on {told['host']}"
    heading = f"== {one.name}, {where}: {state}{one.doing} ({duration(one.seconds)})"
    log = run_dir / "logs" / f"{one.name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:] if log.is_file() else []
    return "\n".join([heading, *(lines or ["(no log)"]), _stack(told["host"], told["process"])])


def _stack(host: str, process: int) -> str:
    if host != socket.gethostname():
        return f"(no stack: it runs on {host})"
    tool = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if tool is None:
        return "(no stack: py-spy is not installed)"
    try:
        # Without stopping it: a process that is stopped already would be waited for.
        command = [tool, "dump", "--nonblocking", "--pid", str(process)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=STACK_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"(no stack: py-spy gave none within {STACK_TIMEOUT_S:g} s)"
    return done.stdout.strip() if done.returncode == 0 else f"(no stack: {done.stderr.strip()})"
