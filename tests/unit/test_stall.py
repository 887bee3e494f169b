"""The report of a stall: who was doing what, its last words and its stack."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_ray.errors import EngineError, Stalled
from rlhf_ray.tracking.activity import NOW, TRACE
from rlhf_ray.tracking.stall import reporting_stalls, write_report

HANGING = """
import sys, time
from pathlib import Path
from rlhf_ray.tracking.activity import Activity

def wait_for_a_rank_that_never_comes():
    time.sleep(600)

with Activity("policy-0", Path(sys.argv[1])).busy("step"):
    print("ready", flush=True)
    wait_for_a_rank_that_never_comes()
"""


def test_a_stall_names_a_report_with_the_stack_and_the_log_of_the_process_that_hangs(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "policy-0.log").write_text("\n".join(f"line {i}" for i in range(100)))
    hanging = subprocess.Popen([sys.executable, "-c", HANGING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert hanging.stdout is not None and hanging.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30
        now = tmp_path / "trace" / "policy-0.now"
        while not (now.is_file() and '"step"' in now.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with (
            pytest.raises(Stalled, match="policy trainer: optimizer step: no answer") as raised,
            reporting_stalls(tmp_path),
        ):
            raise Stalled("policy trainer: optimizer step: no answer within 5 s")
    finally:
        hanging.kill()
        hanging.wait()
    path = Path(str(raised.value).rpartition(": ")[2])
    report = path.read_text()
    assert path.parent == tmp_path / "stalls"
    assert report.startswith("policy trainer: optimizer step: no answer within 5 s\n\nWaiting for it: nobody\n")
    assert f"== policy-0, process {hanging.pid} on " in report and ": step (" in report
    assert "line 99" in report and "line 80\n" in report and "line 79\n" not in report
    assert "wait_for_a_rank_that_never_comes" in report or "Permission" in report


@pytest.mark.parametrize(
    ("hung", "waiting"),
    [
        ("reference-0", "driver, in `wait` for 9 s"),
        ("policy-0", "policy-1, in `step` for 5 s; rollout-0, in `transfer` for 4 s"),
        ("rollout-1-part-1", "driver, in `wait` for 9 s; rollout-1, in `generate` for 3 s"),
        ("critic-0", "driver, in `wait` for 9 s"),
        (None, "driver, in `wait` for 9 s"),
    ],
)
def test_a_report_says_who_waits_for_the_one_that_hangs(tmp_path, hung: str | None, waiting: str):
    (tmp_path / TRACE).mkdir()
    doing = {
        "driver": ("wait", 9),
        "policy-0": ("step", 6),
        "policy-1": ("step", 5),
        "critic-0": ("forward", 8),
        "reference-0": ("idle", 7),
        "rollout-0": ("transfer", 4),
        "rollout-1": ("generate", 3),
        "critic-1": ("step", 2),
    }
    now = time.time()
    for name, (what, seconds) in doing.items():
        silent = 60 if name == "critic-1" else 0  # which hangs, too
        told = {"doing": what, "since": now - seconds - silent, "told": now - silent, "host": "elsewhere", "process": 1}
        (tmp_path / TRACE / f"{name}{NOW}").write_text(json.dumps(told))
    report = write_report(tmp_path, "no sign", hung).read_text()
    assert report.startswith(f"no sign\n\nWaiting for it: {waiting}\n")


def test_a_report_that_cannot_be_written_does_not_hide_the_stall(tmp_path):
    (tmp_path / "stalls").write_text("a file where the folder should be")
    said = "optimizer step: no answer\nWhat every process was doing could not be written"
    with pytest.raises(Stalled, match=said), reporting_stalls(tmp_path):
        raise Stalled("optimizer step: no answer")


def test_other_errors_pass_without_a_report(tmp_path):
    with pytest.raises(EngineError, match="broken"), reporting_stalls(tmp_path):
        raise EngineError("broken")
    assert not (tmp_path / "stalls").exists()


def test_a_stall_before_any_process_said_a_word_is_reported_too(tmp_path):
    with pytest.raises(Stalled, match="stalls/"), reporting_stalls(tmp_path):
        raise Stalled("placement")
