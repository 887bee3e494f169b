"""What the processes of a run say of themselves, and how it is shown."""

import json
import time
from pathlib import Path

import pytest

from rlhf_ray.cli import main
from rlhf_ray.errors import StageError
from rlhf_ray.tracking.activity import NOW_EVERY_S, Activity
from rlhf_ray.tracking.status import SILENT_S, duration, forget, last_metrics, read_status


def say(run: Path, name: str, **told: object) -> None:
    (run / "trace").mkdir(exist_ok=True)
    (run / "trace" / f"{name}.now").write_text(json.dumps({"doing": "idle", "since": 0.0, "told": 0.0} | told))


def wait_for(run: Path, name: str, doing: str) -> None:
    deadline = time.monotonic() + 30
    while not (one := [p for p in read_status(run) if p.name == name]) or one[0].doing != doing:
        assert time.monotonic() < deadline, one
        time.sleep(0.05)


def test_a_process_tells_what_it_does_while_it_does_it(tmp_path):
    recorder = Activity("policy-0", tmp_path)
    (tmp_path / "trace" / "policy-0.now").write_text('{"doing": "nothing yet", "since": 0, "told": 0}')
    wait_for(tmp_path, "policy-0", "idle")
    recorder.hold_version(7)
    with recorder.busy("step", tokens=100, responses=4), recorder.busy("forward"):
        wait_for(tmp_path, "policy-0", "forward")
        (one,) = read_status(tmp_path)
        assert (one.version, one.queue, one.tokens, one.tokens_per_second) == (7, 2, 0, None)
        assert one.silent < SILENT_S and one.seconds < 30
    wait_for(tmp_path, "policy-0", "idle")
    (one,) = read_status(tmp_path)
    assert (one.queue, one.tokens, one.responses) == (0, 100, 4)
    assert one.tokens_per_second is not None and one.tokens_per_second > 0


def test_seconds_are_counted_from_what_was_told(tmp_path):
    say(tmp_path, "rollout-0", doing="generate", since=100.0, told=130.0, rlhf_weight_version=3, rlhf_queue=2)
    (one,) = read_status(tmp_path, now=131.5)
    assert (one.name, one.doing, one.seconds, one.silent) == ("rollout-0", "generate", 31.5, 1.5)
    assert (one.version, one.queue) == (3, 2)


def test_the_command_shows_every_process_and_marks_the_silent(tmp_path, capsys):
    now = time.time()
    say(tmp_path, "critic-0", doing="step", since=now - 3, told=now, rlhf_tokens_total=12345.0)
    say(tmp_path, "rollout-0", doing="generate", since=now - 200, told=now - 125, rlhf_weight_version=3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5}\n{"ste')
    with pytest.raises(SystemExit) as ended:
        main(["status", str(tmp_path)])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "step 5 is done" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "step" in lines["critic-0"] and "12,345" in lines["critic-0"]
    assert "silent (was: generate)" in lines["rollout-0"] and "2 min " in lines["rollout-0"]


def test_a_directory_without_a_run_is_one_error(tmp_path, capsys):
    with pytest.raises(StageError, match="holds no word of any process"):
        read_status(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["status", str(tmp_path)])
    assert ended.value.code != 0 and "name the directory of a run" in capsys.readouterr().err
    assert last_metrics(tmp_path) == {}


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_durations_read_as_people_write_them(seconds, said):
    assert duration(seconds) == said


def test_who_has_left_is_forgotten_and_who_cannot_be_read_is_left_out(tmp_path):
    for name in ("rollout-0", "rollout-1", "policy-0", "critic-0"):
        say(tmp_path, name)
    forget(tmp_path, "rollout-1")
    (tmp_path / "trace" / "critic-0.now").write_text("")
    assert [one.name for one in read_status(tmp_path)] == ["policy-0", "rollout-0"]
    forget(tmp_path)
    with pytest.raises(StageError, match="no word of any process"):
        read_status(tmp_path)


def test_a_process_that_is_done_with_a_run_falls_silent(tmp_path):
    recorder = Activity("driver", tmp_path)
    recorder.close()
    time.sleep(NOW_EVERY_S)  # what was being written is written
    forget(tmp_path)
    time.sleep(2 * NOW_EVERY_S)
    assert not list((tmp_path / "trace").glob("*.now"))


def test_a_finished_run_is_said_to_have_finished(tmp_path, capsys):
    say(tmp_path, "policy-0")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["status", str(tmp_path)])
    assert "the run has finished" in capsys.readouterr().out
