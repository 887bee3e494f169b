"""Failures on purpose: a process of a run is killed, stopped or failed in the state that a plan names.

What recovery costs can be told only where a failure has one cause, so it comes at a state and not at a time: when
`policy-0` begins its third backward pass, when `driver` is about to seal a checkpoint. The states of a process are the
spans that it records (`tracking/activity.py`), the word "tokens" each time it has sampled, scored or trained on some,
and what the code tells `reached` itself.

A plan is a JSON file that the environment variable `RLHF_RAY_CHAOS` names, with `run_dir` and `events`, each of which
has the fields of `Event`. An event happens once, whoever is started again: the process that reaches the state first
creates `<event>.happened` beside the plan, which says when that was and what was struck. Without the variable nothing
of this happens.
"""

import errno
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal

CHAOS = "RLHF_RAY_CHAOS"
HAPPENED = ".happened"
LONGEST_HOLD_S = 300.0


@dataclass(frozen=True)
class Event:
    """One failure.

    Attributes:
        name: of the event, and of the file that says that it happened.
        actor: the process whose state it waits for, such as "rollout-0" or "driver".
        state: the state.
        count: how often that process has reached the state by then.
        action: "kill" and "stop" are the signals; "kill node" kills the raylet that started the victim, and all that it
            started; "no space" raises what a full disk raises, in the process that reached the state; "hold" keeps
            that process in its state until another event has happened; "mark" does nothing, for whoever watches.
        victim: the process that is struck, on the same host; None is the one that reached the state.
        after: an event that must have happened before; occasions are counted from then on.
        until: the event that ends a "hold".
    """

    name: str
    actor: str
    state: str
    count: int = 1
    action: Literal["kill", "stop", "kill node", "no space", "hold", "mark"] = "kill"
    victim: str | None = None
    after: str | None = None
    until: str | None = None


def write_plan(path: Path, run_dir: Path, events: list[Event]) -> dict[str, str]:
    """Write a plan; returns the environment in which it is carried out."""
    path.write_text(json.dumps({"run_dir": str(run_dir), "events": [asdict(event) for event in events]}, indent=1))
    return {CHAOS: str(path)}


def environment() -> dict[str, str]:
    """What hands the plan of this process on to those that it starts."""
    return {CHAOS: os.environ[CHAOS]} if CHAOS in os.environ else {}


def reached(state: str) -> None:
    """The process is in a state now; what the plan has for it happens.

    Raises:
        OSError: the plan says so.
    """
    plan = _plan()
    if plan is not None:
        plan.reached(state)


@cache
def _plan() -> "_Plan | None":
    """The plan, as far as it is about this process."""
    if CHAOS not in os.environ:
        return None
    from rlhf_ray.tracking.logs import ACTOR

    return _Plan(Path(os.environ[CHAOS]), os.environ.get(ACTOR, "driver"))


class _Plan:
    def __init__(self, path: Path, actor: str) -> None:
        written = json.loads(path.read_text())
        self._folder = path.parent
        self._run_dir = Path(written["run_dir"])
        self._actor = actor
        self._lock = Lock()
        events = [Event(**fields) for fields in written["events"]]
        self._left = {event: 0 for event in events if event.actor == actor}  # -> occasions so far

    def reached(self, state: str) -> None:
        due = []
        with self._lock:
            for event in [event for event in self._left if event.state == state]:
                if event.after is None or self._file(event.after).exists():
                    self._left[event] += 1
                if self._left[event] == event.count:
                    del self._left[event]
                    due.append(event)
        for event in due:
            self._strike(event)

    def _file(self, event: str) -> Path:
        return self._folder / f"{event}{HAPPENED}"

    def _strike(self, event: Event) -> None:
        process = os.getpid() if event.victim is None else self._process_of(event.victim)
        victim = event.victim or self._actor
        try:
            with self._file(event.name).open("x") as file:
                file.write(json.dumps({"time": time.time(), "victim": victim, "process": process}))
        except FileExistsError:
            return
        if event.action == "kill":
            os.kill(process, signal.SIGKILL)
        elif event.action == "stop":
            os.kill(process, signal.SIGSTOP)
        elif event.action == "kill node":
            _kill_node(process)
        elif event.action == "no space":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif event.until is not None:
            deadline = time.monotonic() + LONGEST_HOLD_S
            while not self._file(event.until).exists() and time.monotonic() < deadline:
                time.sleep(0.02)

    def _process_of(self, actor: str) -> int:
        from rlhf_ray.tracking.activity import NOW, TRACE

        now: dict[str, Any] = json.loads((self._run_dir / TRACE / f"{actor}{NOW}").read_text())
        return int(now["process"])


def _kill_node(process: int) -> None:
    """End the raylet that started a process, and all that it started, as a machine's end does; this process last."""
    import psutil

    raylet = psutil.Process(process).parent()
    assert raylet is not None
    started = raylet.children(recursive=True)
    raylet.kill()
    for one in sorted(started, key=lambda one: one.pid == os.getpid()):
        one.kill()
