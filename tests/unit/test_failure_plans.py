"""Failures on purpose happen in the state that the plan names, once, and nowhere else."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.runtime.chaos import CHAOS, HAPPENED, Event, environment, write_plan
from rlhf_ray.tracking.logs import ACTOR

KILLED = -signal.SIGKILL


@pytest.fixture
def act(tmp_path: Path):
    """A process that goes through states under a plan: its exit code and what it printed."""

    def run(actor: str, script: str, *events: Event) -> tuple[int, str]:
        variables = write_plan(tmp_path / "plan.json", tmp_path, list(events)) if events else {}
        if actor != "driver":
            variables[ACTOR] = actor
        code = "from rlhf_ray.runtime.chaos import reached\n" + textwrap.dedent(script)
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout + done.stderr

    return run


STEPS = "for n in range(4): print(n, flush=True); reached('step'); reached('forward')"


def happened(folder: Path, event: str) -> dict[str, Any]:
    return json.loads((folder / f"{event}{HAPPENED}").read_text())


def test_a_process_is_killed_at_the_occasion_that_the_plan_names_and_its_successor_is_not(act, tmp_path: Path):
    event = Event("one", "policy-0", "step", count=3)
    assert act("policy-0", STEPS, event) == (KILLED, "0\n1\n2\n")
    assert happened(tmp_path, "one")["victim"] == "policy-0"
    assert act("policy-0", STEPS, event) == (0, "0\n1\n2\n3\n")


def test_other_processes_and_other_states_go_on(act, tmp_path: Path):
    events = [Event("other", "policy-1", "step"), Event("state", "policy-0", "backward")]
    assert act("policy-0", STEPS, *events) == (0, "0\n1\n2\n3\n")
    assert not list(tmp_path.glob(f"*{HAPPENED}"))
    assert act("driver", STEPS, Event("driver", "driver", "step")) == (KILLED, "0\n")


def test_without_a_plan_nothing_happens(act):
    assert act("policy-0", STEPS) == (0, "0\n1\n2\n3\n")


def test_occasions_are_counted_from_the_event_before_on(act):
    events = [
        Event("first", "driver", "forward", count=2, action="mark"),
        Event("then", "driver", "step", after="first"),
    ]
    assert act("driver", STEPS, *events) == (KILLED, "0\n1\n2\n")


def test_a_process_is_held_in_its_state_until_another_event(act, tmp_path: Path):
    script = f"""
        import pathlib, threading
        threading.Timer(0.5, reached, ["other"]).start()
        reached("step")
        print(pathlib.Path({str(tmp_path)!r}, "awaited{HAPPENED}").exists())
    """
    events = [
        Event("held", "driver", "step", action="hold", until="awaited"),
        Event("awaited", "driver", "other", action="mark"),
    ]
    assert act("driver", script, *events) == (0, "True\n")


def test_a_full_disk_is_an_error_of_the_operating_system(act):
    script = "try: reached('step')\nexcept OSError as error: print(error.errno)\nreached('step')"
    assert act("driver", script, Event("full", "driver", "step", action="no space")) == (0, f"{errno.ENOSPC}\n")


def test_another_process_is_struck_where_it_says_it_is(act, tmp_path: Path):
    (tmp_path / "trace").mkdir()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as victim:
        (tmp_path / "trace" / "rollout-0.now").write_text(json.dumps({"process": victim.pid}))
        assert act("driver", STEPS, Event("idle", "driver", "step", victim="rollout-0"))[0] == 0
        assert victim.wait(30) == KILLED
    assert happened(tmp_path, "idle")["process"] == victim.pid


def test_a_span_is_a_state_and_so_are_its_tokens(act, tmp_path: Path):
    script = """
        from rlhf_ray.tracking.activity import Activity
        activity = Activity("policy-0", None)
        for n in range(3):
            with activity.busy("step", tokens=5): print(n, flush=True)
    """
    assert act("policy-0", script, Event("before", "policy-0", "step", count=2)) == (KILLED, "0\n")
    assert act("policy-0", script, Event("after", "policy-0", "tokens", count=2)) == (KILLED, "0\n1\n")


def test_actors_get_the_plan_of_their_driver(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(CHAOS, raising=False)
    assert environment() == {}
    monkeypatch.setenv(CHAOS, "plan.json")
    assert environment() == {CHAOS: "plan.json"}
