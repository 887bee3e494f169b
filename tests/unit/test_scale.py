"""`rlhf-ray scale`: what it leaves for a run under way, and what it refuses."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf_ray.cli import main
from rlhf_ray.config import from_dict
from rlhf_ray.driver.control import CONTROL, wanted_engines
from rlhf_ray.stages.run import open_run

PPO = "rollout:\n  engines: 1\n"


def scale(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["scale", *map(str, arguments)])
    return ended.value.code


@contextmanager
def a_run(folder: Path, config: str = f"run: {{}}\n{PPO}") -> Iterator[Path]:
    """A run's directory, held as by the process that works on it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def test_what_is_asked_for_is_what_the_loop_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with a_run(tmp_path) as run:
        assert scale(run, "rollout=3") == 0
        assert wanted_engines(run) == 3
        assert f"{run}: asked for 3 rollout engines" in capsys.readouterr().out
        assert scale(run, "rollout=1") == 0
        assert wanted_engines(run) == 1


@pytest.mark.parametrize("size", ["rollout=0", "rollout=-1", "rollout=two", "policy=2", "3"])
def test_what_is_no_number_of_engines_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str):
    with a_run(tmp_path) as run:
        assert scale(run, size) == 2
        assert f"{size!r} is no size; write rollout=N with N at least 1" in capsys.readouterr().err
        assert not (run / CONTROL).exists()


def test_what_is_no_run_that_could_scale_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    refusals = {}
    assert scale(tmp_path / "none", "rollout=2") != 0
    refusals["holds no run"] = capsys.readouterr().err
    with a_run(tmp_path, "run: {}\nsft:\n  epochs: 1\n") as run:
        assert scale(run, "rollout=2") != 0
        refusals["holds no PPO run"] = capsys.readouterr().err
    with a_run(tmp_path, f"run: {{}}\n{PPO}placement:\n  share: [[policy, rollout]]\n") as run:
        assert scale(run, "rollout=2") != 0
        refusals["cannot scale by themselves"] = capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(f"run: {{}}\n{PPO}")
    assert scale(tmp_path, "rollout=2") != 0
    refusals["no process works on the run"] = capsys.readouterr().err
    for said, error in refusals.items():
        assert said in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / CONTROL).exists()


def test_what_was_asked_of_an_earlier_process_is_forgotten_when_the_run_is_opened(tmp_path: Path):
    """And at once: what is asked while the run still starts is what it begins with."""
    (tmp_path / CONTROL).write_text('{"rollout": 5}')
    values = {"run": {"dir": str(tmp_path)}, "data": {"path": "x"}, "model": {"path": "m"}, "sft": {}}
    with open_run(from_dict(values, "sft"), "sft") as run:
        assert wanted_engines(tmp_path) is None
        (tmp_path / CONTROL).write_text('{"rollout": 3}')
        assert wanted_engines(run.directory.path) == 3
