"""What every stage has around it: its directory, tracker, checkpoints, progress, and a way to be stopped."""

import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rlhf_ray.config import dump_config
from rlhf_ray.config.pipeline import StageConfig
from rlhf_ray.driver.checkpoint import Checkpoint, CheckpointStore
from rlhf_ray.driver.control import forget
from rlhf_ray.driver.saving import Save, Saver
from rlhf_ray.driver.storage import CheckpointStorage, StorageUnreachable
from rlhf_ray.errors import ActorDied, CheckpointError, RlhfError, RunStopped, Stalled
from rlhf_ray.models.saving import is_complete
from rlhf_ray.names import model_folder
from rlhf_ray.tracking.logs import setup_logging
from rlhf_ray.tracking.progress import StageProgress
from rlhf_ray.tracking.rundir import RunDirectory
from rlhf_ray.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

# Keys of any section that say where a run is computed and in which pieces, and nothing about its numbers.
WHERE_AND_HOW = (
    *("processes", "engines", "min_engines", "cpus", "gpus", "tensor_parallel", "nodes_per_engine"),
    *("zero_stage", "offload_optimizer", "gradient_checkpointing", "micro_batch_tokens", "attention", "compile"),
    *("max_concurrency", "kv_cache_gib", "gpu_memory_utilization", "vllm"),
)

# A run that SIGTERM ends within its grace needs the rest of it to end its actors.
SHARE_OF_GRACE = 0.8

# Ctrl-C sooner than this after a request to stop is the same request once more.
REPEATED_SIGNAL_S = 1.0


class Run:
    """An open run of one stage.

    Attributes:
        directory: its folder.
        checkpoint: what it continues from; None at the start.
    """

    def __init__(self, config: StageConfig, stage: str, directory: RunDirectory, stack: ExitStack) -> None:
        self.directory = directory
        self._config = config
        self._stage = stage
        self._stack = stack
        self._stop = threading.Event()
        self._ending: threading.Timer | None = None  # runs from SIGTERM on
        self._overdue = False
        forget(directory.path)
        self._store = CheckpointStore(directory.checkpoints, config.run.keep_checkpoints)
        storage = _storage(config, stage, self._store)
        self._saver = Saver(self._store, storage, config.run.timeout_s)
        self.checkpoint: Checkpoint | None = self._store.latest()
        if storage is not None:
            storage.start_step = self.start_step
        directory.truncate_after(self.start_step - 1)
        directory.write_config(dump_config(config))
        self._tracker = stack.enter_context(
            Tracker(
                directory,
                config.tracking,
                config.model_dump(mode="json"),
                name=f"{stage}-{directory.path.name}-s{config.run.seed}",
                job_type=stage,
                run_id=self.state.get("wandb_run_id"),
            )
        )
        self._progress: StageProgress | None = None
        self._total = 0

    @property
    def start_step(self) -> int:
        """Steps done before this process."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def state(self) -> dict[str, Any]:
        """The driver's state in the checkpoint that is continued; empty at the start."""
        return self.checkpoint.state if self.checkpoint else {}

    @property
    def begun(self) -> bool:
        """Whether the first step may have been taken."""
        return self._progress is not None

    @property
    def model_folder(self) -> Path:
        """Where the stage leaves its model."""
        return model_folder(self.directory.path)

    def begin(self, total_steps: int, shown: list[str]) -> range:
        """The steps still to do; from here on progress is shown, and SIGTERM or Ctrl-C asks for an end."""
        self._total = total_steps
        progress = StageProgress(self._stage, total_steps, shown, start=self.start_step)
        self._progress = self._stack.enter_context(progress)
        self._stack.enter_context(self._stop_on_signal())
        return range(self.start_step, total_steps)

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may have handlers; embedded callers stop the run their own way
            return
        asked_at = math.inf
        ending = self._ending = threading.Timer(SHARE_OF_GRACE * self._config.run.grace_s, self._end_now)
        ending.daemon = True

        def stop(number: int, _: object) -> None:
            nonlocal asked_at
            if self._overdue:
                raise RunStopped(self._ended_early())
            # Wrappers such as `timeout` and `make` pass a signal on that the run has already got.
            if number == signal.SIGINT and time.monotonic() - asked_at > REPEATED_SIGNAL_S:
                raise KeyboardInterrupt
            if not self._stop.is_set():
                asked_at = time.monotonic()
                logger.warning("stopping after the step under way, with a checkpoint; Ctrl-C ends the run without one")
            self._stop.set()
            if number == signal.SIGTERM and not ending.is_alive() and not ending.finished.is_set():
                ending.start()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            ending.cancel()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _end_now(self) -> None:
        # Handlers alone reach a main thread that waits.
        self._overdue = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _ended_early(self) -> str:
        return (
            f"{self._stage}: stopped by a signal, in the middle of what was under way: run.grace_s "
            f"({self._config.run.grace_s:g} s) is about to pass; {self._continues()}"
        )

    def _continues(self) -> str:
        """What the same command will do, in words."""
        newest = self._store.newest()
        return "the same command starts over" if newest is None else f"the same command continues from step {newest}"

    def log(self, step: int, metrics: Mapping[str, float], samples: list[dict[str, Any]] | None = None) -> None:
        """Record step `step` (counted from 0)."""
        # The line of metrics comes last: a step that it names is complete.
        self._tracker.log_samples(step, samples or [])
        self._tracker.log(step, metrics)
        if self._progress is not None:
            self._progress.update(step + 1, metrics)

    def checkpoint_if_due(self, step: int, state: dict[str, Any], save: Save, score: float | None = None) -> None:
        """After step `step`: a checkpoint where the configuration, the end of the run or a signal asks for it.

        Its files are written while the next steps are taken, but for the last one, which is waited for.

        Args:
            state: what the driver needs to continue, as JSON.
            save: asks the trainers to write into the folder it is given.
            score: how good the model is; the best checkpoint is kept beside the newest.

        Raises:
            RunStopped: a signal asked for the end; the checkpoint is written.
            CheckpointError: the checkpoint after the last step cannot be written.
        """
        done = step + 1
        every = self._config.run.checkpoint_every
        stopping = self._stop.is_set()
        last = done == self._total
        if stopping or last or (every and done % every == 0):
            self._saver.begin(done, {**state, "wandb_run_id": self._tracker.run_id}, save, score)
        if not (stopping or last):
            return
        ended = self._saver.wait()
        failure = self._saver.failure
        if not ended and self._store.newest() != done:  # else its copy is not complete, and the next one completes it
            failure = "it is still being written"
        if stopping:
            written = f"no checkpoint could be written of it ({failure})" if failure else "a checkpoint is written"
            raise RunStopped(
                f"{self._stage}: stopped by a signal after step {done} of {self._total}; {written}, and "
                f"{self._continues()}"
            )
        if failure:
            raise CheckpointError(
                f"{self._stage}: the checkpoint after the last step, {done}, could not be written: {failure}. See to "
                f"it that {self.directory.checkpoints} can be written; {self._continues()}"
            )

    def checkpoint_at_the_end(self, step: int, state: dict[str, Any], save: Save, score: float | None = None) -> None:
        """A checkpoint after step `step`, unless there is one, for a run that is about to fail. Arguments as above."""
        self._saver.wait()
        if self._store.newest() == step + 1:
            return
        try:
            self._saver.begin(step + 1, {**state, "wandb_run_id": self._tracker.run_id}, save, score)
            self._saver.wait()
        except RlhfError as error:  # what ends the run counts more
            logger.warning("no checkpoint after step %d: %s", step + 1, error)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the loop, while the trainers live: what ends it leaves no checkpoint half written that could be whole.

        Raises:
            RunStopped: a process died in a run that a signal asked to end, and that is not to start again.
        """
        try:
            yield
        except RunStopped:
            raise
        except Exception as error:
            self._saver.wait(self._config.run.min_timeout_s)
            if self._stop.is_set() and isinstance(error, ActorDied | Stalled):
                raise RunStopped(
                    f"{self._stage}: stopped by a signal; the step under way failed meanwhile, and "
                    f"{self._continues()}\n{error}"
                ) from error
            raise
        finally:
            if self._ending is not None:  # what follows takes seconds, and nothing is left to give up
                self._ending.cancel()
            self._overdue = False
            self._saver.close()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary: the stage is complete."""
        self._tracker.finish({"stage": self._stage, "model": str(self.model_folder), **summary})


def _storage(config: StageConfig, stage: str, store: CheckpointStore) -> CheckpointStorage | None:
    """Where copies of the checkpoints go; a run without any first gets the newest from there.

    Raises:
        ConfigError: there is no such storage.
        StageError: it holds another run's checkpoints, or a run without checkpoints cannot reach it.
    """
    if config.run.checkpoint_storage is None:
        return None
    storage = CheckpointStorage(config.run.checkpoint_storage)
    try:
        storage.claim(identity(config, stage))
        if store.newest() is None:
            storage.fetch(store.folder)
    except StorageUnreachable as error:
        # Whoever starts over unasked would replace what is there.
        if store.newest() is None:
            raise
        logger.warning("%s; the next checkpoint tries again", error)
    return storage


def is_finished(run_dir: str | Path) -> bool:
    """Whether the stage with this run directory ran to its end."""
    return (Path(run_dir) / "summary.json").is_file() and is_complete(model_folder(run_dir))


def identity(config: StageConfig, stage: str) -> dict[str, Any]:
    """What must stay the same for a run to be continued, by dotted key: everything that enters its numbers.

    Left out is what decides where and in which pieces they are computed, so that a run continues on other machines,
    or with less memory: it changes the order of sums alone.
    """
    values = config.model_dump(mode="json", exclude={"tracking", "group", "placement"})
    values["run"] = {"seed": config.run.seed}
    for function in values.get("reward", {}).get("functions", []):
        del function["timeout_s"], function["min_scored"]  # whether the run goes on, not how
    for section in values.values():
        if isinstance(section, dict):
            for key in WHERE_AND_HOW:
                section.pop(key, None)
    return {"stage": stage} | {
        f"{name}.{key}": value for name, section in values.items() for key, value in section.items()
    }


def finished_model(config: StageConfig, stage: str) -> Path | None:
    """The model that an earlier, finished run of this very configuration left; None if it has yet to finish.

    Raises:
        StageError: the directory holds a finished run of another configuration, or `run.resume` is never.
    """
    if not is_finished(config.run.dir):
        return None
    with RunDirectory(config.run.dir, config.run.resume, identity(config, stage)) as directory:
        logger.info("%s is finished already", directory.path)
        return model_folder(directory.path)


@contextmanager
def open_run(config: StageConfig, stage: str) -> Iterator[Run]:
    """Open or reopen the stage's run directory. One that is new, and whose run fails before any actor has started,
    is removed again: wrong input leaves nothing behind.

    Args:
        config: the stage's configuration.
        stage: "sft", "reward", "dpo" or "ppo".

    Raises:
        StageError: the directory holds another run, or another process writes it.
    """
    folder = Path(config.run.dir)
    is_new = not folder.is_dir() or not any(folder.iterdir())
    held = begun = False
    try:
        with ExitStack() as stack:
            directory = stack.enter_context(RunDirectory(folder, config.run.resume, identity(config, stage)))
            held = True
            setup_logging(directory.logs, "driver")
            run = Run(config, stage, directory, stack)
            if run.checkpoint:
                logger.info("continuing %s from step %d", directory.path, run.checkpoint.step)
            try:
                yield run
            finally:
                begun = run.begun
    except RlhfError:
        actor_logs = [path for path in (folder / "logs").glob("*.log") if path.name != "driver.log"]
        if held and is_new and not begun and not actor_logs:
            shutil.rmtree(folder, ignore_errors=True)
        raise
