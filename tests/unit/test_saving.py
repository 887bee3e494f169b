"""Checkpoints beside a running loop: real files and threads, trainers that write when they are told to."""

import json
import os
import signal
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from rlhf_ray.config import from_dict
from rlhf_ray.driver.checkpoint import CheckpointStore
from rlhf_ray.driver.saving import Saver
from rlhf_ray.driver.storage import RECORDS, StorageUnreachable
from rlhf_ray.errors import ActorDied, CheckpointError, ConfigError, RunStopped, StageError
from rlhf_ray.stages.run import Run, open_run

LIMIT_S = 30.0  # no test waits so long unless it fails


class Trainer:
    """One whose files are written once `go` is set; `error` is raised instead."""

    def __init__(self, error: Exception | None = None, go: bool = True) -> None:
        self.go = threading.Event()
        self.error = error
        self.folder = Path()
        if go:
            self.go.set()

    def save(self, folder: Path) -> list["Trainer"]:
        self.folder = folder
        return [self]

    def taken(self) -> None:
        pass

    def written(self, given_up: threading.Event) -> None:
        while not self.go.wait(0.01):
            if given_up.is_set():
                return
        if self.error:
            raise self.error
        (self.folder / "weights").write_text("weights")


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path, keep=2)


def test_the_loop_goes_on_while_files_are_written(store):
    saver, trainer, state = Saver(store, None, LIMIT_S), Trainer(go=False), {"position": [1]}
    saver.begin(1, state, trainer.save, None)
    state["position"].append(2)  # by the next step
    assert steps(store.folder) == [".step_000001"]
    trainer.go.set()
    assert saver.wait()
    assert saver.failure is None
    assert store.latest().state == {"position": [1]}


def test_the_next_checkpoint_waits_for_the_one_before(store):
    saver, first = Saver(store, None, LIMIT_S), Trainer(go=False)
    saver.begin(1, {}, first.save, None)
    threading.Timer(0.1, first.go.set).start()
    saver.begin(2, {}, Trainer().save, None)
    assert "step_000001" in steps(store.folder)
    assert saver.wait()
    assert steps(store.folder) == ["step_000001", "step_000002"]


def test_one_that_takes_too_long_costs_the_next_one_and_not_the_run(store, caplog):
    saver, slow = Saver(store, None, 0.05), Trainer(go=False)
    saver.begin(1, {}, slow.save, None)
    saver.begin(2, {}, Trainer().save, None)
    assert "no checkpoint after step 2: the one before is still being written or copied" in caplog.text
    slow.go.set()
    assert saver.wait(LIMIT_S)
    saver.begin(3, {}, Trainer().save, None)
    assert saver.wait(LIMIT_S)
    assert steps(store.folder) == ["step_000001", "step_000003"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), CheckpointError("rank 1 could not write")])
def test_a_failure_is_told_once_and_swept_and_the_next_one_is_tried(store, caplog, error):
    saver = Saver(store, None, LIMIT_S)
    saver.begin(1, {}, Trainer(error).save, None)
    assert saver.wait()
    assert steps(store.folder) == []
    assert saver.failure == str(error)
    assert caplog.text.count("no checkpoint after step 1: ") == 1
    saver.begin(2, {}, Trainer().save, None)
    assert saver.wait()
    assert saver.failure is None
    assert steps(store.folder) == ["step_000002"]


def test_a_folder_that_cannot_be_made_is_a_failure_as_well(store, caplog):
    store.folder.rmdir()
    store.folder.write_text("a file is in the way")
    saver = Saver(store, None, LIMIT_S)
    saver.begin(1, {}, Trainer().save, None)
    assert saver.wait()
    assert "no checkpoint after step 1: [Errno" in caplog.text


def test_a_trainer_that_died_ends_the_loop(store):
    trainer = Trainer()

    def taken() -> None:
        raise ActorDied("policy-0")

    trainer.taken = taken
    with pytest.raises(ActorDied):
        Saver(store, None, LIMIT_S).begin(1, {}, trainer.save, None)


def test_what_is_under_way_at_the_end_is_given_up(store):
    saver = Saver(store, None, LIMIT_S)
    saver.begin(1, {}, Trainer(go=False).save, None)
    saver.close()
    assert steps(store.folder) == []


# ---- a run around it


def open_stage(tmp_path, **run):
    values = {
        "run": {"dir": str(tmp_path / "run"), **run},
        "data": {"path": "none"},
        "model": {"path": "none"},
        "sft": {},
    }
    return open_run(from_dict(values, "sft"), "sft")


def take_steps(run: Run, trainer: Trainer, total: int, after=lambda step: None) -> None:
    with run.saving():
        for step in run.begin(total, []):
            run.log(step, {"loss": 1.0})
            after(step)
            run.checkpoint_if_due(step, {"step": step}, trainer.save)


def test_the_last_checkpoint_must_be_written(tmp_path):
    full = Trainer(OSError(28, "No space left on device"))
    with (
        pytest.raises(CheckpointError, match=r"after the last step, 2, could not be written: .*No space.*starts over"),
        open_stage(tmp_path, checkpoint_every=1) as run,
    ):
        take_steps(run, full, 2)
    with open_stage(tmp_path) as run:
        take_steps(run, Trainer(), 2)
    with open_stage(tmp_path) as run:
        assert (run.start_step, run.state["step"]) == (2, 1)


def test_an_error_in_the_loop_leaves_the_checkpoint_whole(tmp_path):
    trainer = Trainer(go=False)

    def break_off(step: int) -> None:
        if step == 1:
            threading.Timer(0.1, trainer.go.set).start()
            raise ActorDied("rollout-0")

    with pytest.raises(ActorDied), open_stage(tmp_path, checkpoint_every=1) as run:
        take_steps(run, trainer, 3, break_off)
    assert steps(tmp_path / "run" / "checkpoints") == ["step_000001"]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_after_the_step_under_way(tmp_path):
    with (
        pytest.raises(
            RunStopped, match=r"after step 2 of 5; a checkpoint is written, and the same command continues from"
        ),
        open_stage(tmp_path, grace_s=LIMIT_S) as run,
    ):
        take_steps(run, Trainer(), 5, lambda step: terminate() if step == 1 else None)
    assert steps(tmp_path / "run" / "checkpoints") == ["step_000002"]


def test_a_process_that_dies_in_a_run_that_is_to_end_does_not_start_it_again(tmp_path):
    def die(step: int) -> None:
        if step == 2:
            terminate()
            raise ActorDied("policy-0 died")

    told = r"stopped by a signal; the step under way failed meanwhile, and the same command continues from step 2\n"
    with pytest.raises(RunStopped, match=f"{told}policy-0 died"), open_stage(tmp_path, checkpoint_every=1) as run:
        take_steps(run, Trainer(), 5, die)


@pytest.mark.parametrize("every", [0, 1])
def test_a_step_that_outlasts_the_grace_is_given_up(tmp_path, every):
    """The step would wait for longer than the test may take."""

    def hang(step: int) -> None:
        if step == 1:
            terminate()
            threading.Event().wait(LIMIT_S)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStopped) as error, open_stage(tmp_path, checkpoint_every=every, grace_s=0.2) as run:
        take_steps(run, Trainer(), 5, hang)
    goes_on = "continues from step 1" if every else "starts over"
    assert str(error.value) == (
        "sft: stopped by a signal, in the middle of what was under way: run.grace_s (0.2 s) is about to pass; the "
        f"same command {goes_on}"
    )
    assert error.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_checkpoint_that_outlasts_the_grace_is_given_up(tmp_path):
    with pytest.raises(RunStopped, match="starts over"), open_stage(tmp_path, grace_s=0.2) as run:
        take_steps(run, Trainer(go=False), 5, lambda step: terminate())
    assert steps(tmp_path / "run" / "checkpoints") == []


# ---- copies elsewhere


@pytest.fixture
def url(tmp_path) -> str:
    return f"file://{tmp_path}/elsewhere/run"


def lose(tmp_path) -> None:
    (tmp_path / "run").rename(tmp_path / "lost")


def copied(tmp_path) -> list[str]:
    return [name for name in steps(tmp_path / "elsewhere" / "run") if name not in RECORDS]


def test_a_run_whose_folder_is_lost_continues_from_the_storage(tmp_path, url):
    with pytest.raises(RunStopped), open_stage(tmp_path, checkpoint_every=1, checkpoint_storage=url) as run:
        take_steps(run, Trainer(), 9, lambda step: terminate() if step == 3 else None)
    assert copied(tmp_path) == ["run.json", "step_000003", "step_000004"]
    lose(tmp_path)
    with open_stage(tmp_path, checkpoint_storage=url) as run:
        assert (run.start_step, run.state["step"]) == (4, 3)
        assert (run.checkpoint.folder / "weights").read_text() == "weights"
        take_steps(run, Trainer(), 5)
    assert copied(tmp_path) == ["run.json", "step_000004", "step_000005"]
    assert steps(tmp_path / "run" / "checkpoints") == ["step_000004", "step_000005"]


def test_metrics_ledger_and_samples_are_not_lost_with_the_folder(tmp_path, url):
    def take(run: Run, total: int, word: str, stop_at: int | None = None) -> None:
        with run.saving():
            for step in run.begin(total, []):
                run.log(step, {"loss": 1.0 + step}, [{"uid": f"{word} {step}"}])
                with run.directory.ledger.open("a") as file:
                    file.write(json.dumps({"event": "trained", "iteration": step}) + "\n")
                if step == stop_at:
                    terminate()
                run.checkpoint_if_due(step, {"step": step}, Trainer().save)

    def uids(folder: Path) -> list[str]:
        return [pq.read_table(file)["uid"][0].as_py() for file in sorted((folder / "samples").glob("*.parquet"))]

    with pytest.raises(RunStopped), open_stage(tmp_path, checkpoint_every=1, checkpoint_storage=url) as run:
        take(run, 9, "first", stop_at=2)
    lose(tmp_path)
    # What came after the newest whole checkpoint is done again, and replaces what is there.
    flip(tmp_path / "elsewhere" / "run" / "step_000003")
    with open_stage(tmp_path, checkpoint_every=1, checkpoint_storage=url) as run:
        assert run.start_step == 2
        take(run, 4, "second")
        assert [row["step"] for row in run.directory.read_metrics()] == [0, 1, 2, 3]
    expected = ["first 0", "first 1", "second 2", "second 3"]
    assert uids(tmp_path / "run") == uids(tmp_path / "elsewhere" / "run") == expected
    for name in RECORDS[:2]:
        assert (tmp_path / "elsewhere" / "run" / name).read_text() == (tmp_path / "run" / name).read_text() != ""


def test_a_run_that_cannot_fetch_its_records_does_not_begin_without_them(tmp_path, url, monkeypatch):
    with pytest.raises(RunStopped), open_stage(tmp_path, checkpoint_every=1, checkpoint_storage=url) as run:
        take_steps(run, Trainer(), 9, lambda step: terminate() if step == 1 else None)
    lose(tmp_path)
    get_file = LocalFileSystem.get_file

    def broken(self: LocalFileSystem, path: str, target: str, **options: object) -> None:
        if path.endswith("metrics.jsonl"):
            Path(target).write_text("{")
            raise OSError("the connection was reset")
        get_file(self, path, target, **options)

    monkeypatch.setattr(LocalFileSystem, "get_file", broken)
    with (
        pytest.raises(StorageUnreachable, match="the connection was reset"),
        open_stage(tmp_path, checkpoint_storage=url),
    ):
        pytest.fail("it began")
    monkeypatch.undo()
    with open_stage(tmp_path, checkpoint_storage=url) as run:
        assert run.start_step == 2
        assert [row["step"] for row in run.directory.read_metrics()] == [0, 1]


def test_records_that_cannot_be_copied_keep_no_checkpoint_back(tmp_path, url, monkeypatch, caplog):
    def broken(*_: object, **__: object) -> None:
        raise OSError("no move")

    monkeypatch.setattr(LocalFileSystem, "mv", broken)
    with open_stage(tmp_path, checkpoint_every=1, checkpoint_storage=url) as run:
        take_steps(run, Trainer(), 2)
    assert "cannot copy metrics, ledger and samples to" in caplog.text
    assert {"step_000001", "step_000002"} <= set(copied(tmp_path))


def test_the_best_is_kept_there_too(tmp_path, url):
    scores = [0.1, 0.8, 0.3, 0.2, 0.1]
    with open_stage(tmp_path, checkpoint_every=1, checkpoint_storage=url, keep_checkpoints=1) as run, run.saving():
        for step in run.begin(5, []):
            run.checkpoint_if_due(step, {}, Trainer().save, scores[step])
    assert copied(tmp_path) == ["run.json", "step_000002", "step_000005"]
    assert steps(tmp_path / "run" / "checkpoints") == ["step_000002", "step_000005"]


def flip(folder: Path) -> None:
    (folder / "weights").write_text("weighty")


def lose_file(folder: Path) -> None:
    (folder / "weights").unlink()


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def leave_folder(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../../escaped"] = [7, "0"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (flip, "weights differs from its checksum"),
        (lose_file, "weights is missing"),
        (lose_manifest, None),
        (leave_folder, "its manifest names ../../../escaped, which is outside of the checkpoint"),
    ],
)
def test_a_damaged_copy_falls_back_to_the_one_before(tmp_path, url, caplog, spoil, told):
    with open_stage(tmp_path, checkpoint_every=1, checkpoint_storage=url) as run:
        take_steps(run, Trainer(), 2)
    lose(tmp_path)
    spoil(tmp_path / "elsewhere" / "run" / "step_000002")
    with open_stage(tmp_path, checkpoint_every=1, checkpoint_storage=url) as run:
        assert run.start_step == 1
        assert told is None or f"step_000002 is damaged ({told})" in caplog.text
        take_steps(run, Trainer(), 2)
    assert not (tmp_path / "escaped").exists()
    # What was damaged is whole again.
    lost = tmp_path / "run"
    lost.rename(tmp_path / "lost again")
    with open_stage(tmp_path, checkpoint_storage=url) as run:
        assert run.start_step == 2


def test_a_storage_that_cannot_be_reached_is_tried_again_at_the_next_checkpoint(tmp_path, url, caplog):
    with open_stage(tmp_path, checkpoint_every=1, checkpoint_storage=url) as run, run.saving():
        elsewhere = tmp_path / "elsewhere"

        def after(step: int) -> None:
            run._saver.wait()
            if step == 0:
                elsewhere.rename(tmp_path / "unplugged")
                elsewhere.write_text("in the way")
            if step == 2:
                elsewhere.unlink()
                (tmp_path / "unplugged").rename(elsewhere)

        take_steps(run, Trainer(), 4, after)
    assert f"cannot copy checkpoints to {url} (" in caplog.text
    assert copied(tmp_path) == ["run.json", "step_000003", "step_000004"]
    assert steps(tmp_path / "run" / "checkpoints") == ["step_000003", "step_000004"]


def test_a_run_that_has_checkpoints_goes_on_without_its_storage(tmp_path, url, caplog):
    with open_stage(tmp_path, checkpoint_storage=url) as run:
        take_steps(run, Trainer(), 2)
    (tmp_path / "elsewhere").rename(tmp_path / "unplugged")
    (tmp_path / "elsewhere").write_text("in the way")
    with open_stage(tmp_path, checkpoint_storage=url) as run:
        assert run.start_step == 2
    assert f"cannot use run.checkpoint_storage {url} (" in caplog.text
    # One without any does not know whether there is something to continue from.
    lose(tmp_path)
    with (
        pytest.raises(StorageUnreachable, match=r"or leave run\.checkpoint_storage out"),
        open_stage(tmp_path, checkpoint_storage=url),
    ):
        pass


def test_the_storage_of_another_run_is_refused(tmp_path, url):
    with open_stage(tmp_path, checkpoint_storage=url) as run:
        take_steps(run, Trainer(), 1)
    lose(tmp_path)
    with (
        pytest.raises(StageError, match=r"of another run: run.seed was 0 and is now 1; set run.checkpoint_storage to"),
        open_stage(tmp_path, checkpoint_storage=url, seed=1),
    ):
        pass


def test_a_storage_that_nobody_knows_is_an_error_of_the_configuration(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"run.checkpoint_storage: cannot use nowhere://x: .*not known"),
        open_stage(tmp_path, checkpoint_storage="nowhere://x"),
    ):
        pass


def test_checkpoints_travel_through_a_storage_without_folders(tmp_path):
    """Object stores have names alone; so has fsspec's memory, but for what it remembers of folders."""
    url = f"memory://{tmp_path.name}/run"
    with open_stage(tmp_path, checkpoint_every=1, checkpoint_storage=url) as run:
        take_steps(run, Trainer(), 3)
    lose(tmp_path)
    with open_stage(tmp_path, checkpoint_storage=url) as run:
        assert run.start_step == 3
