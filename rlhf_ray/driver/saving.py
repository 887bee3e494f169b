"""Checkpoints while training goes on: the loop waits for copies in memory, a thread for the files.

At most one checkpoint is under way; the next one first waits for it. One that fails (a full disk, say) is swept away
and warned about, and the run goes on to the next.
"""

import copy
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf_ray.driver.checkpoint import CheckpointStore
from rlhf_ray.driver.storage import CheckpointStorage
from rlhf_ray.errors import CheckpointError, RlhfError, shortened

logger = logging.getLogger(__name__)

# For a thread that was told to give up.
CLOSING_S = 5.0


class Part(Protocol):
    """What one trainer adds to a checkpoint; see `training/group.py`."""

    def taken(self) -> None:
        """Wait until training may go on."""

    def written(self, given_up: threading.Event) -> None:
        """Wait until its files are complete, or nobody wants them any more."""


Save = Callable[[Path], Sequence[Part]]


class Saver:
    """Writes the checkpoints of one run.

    Args:
        store: where they go.
        storage: where copies of them go; None for nowhere.
        patience_s: longest wait in seconds for a checkpoint under way.

    Attributes:
        failure: why the last one was not written; None where it was, or is under way.
    """

    def __init__(self, store: CheckpointStore, storage: CheckpointStorage | None, patience_s: float) -> None:
        self._store = store
        self._storage = storage
        self._patience_s = patience_s
        # Not by joining the thread: a signal's exception in a join makes Python take it for ended.
        self._ended = threading.Event()
        self._ended.set()
        self._given_up = threading.Event()
        self._begun = 0.0
        self.failure: str | None = None

    def begin(self, step: int, state: dict[str, Any], save: Save, score: float | None) -> None:
        """Begin the checkpoint of `step`: returns as soon as the trainers may go on.

        Args:
            save: asks the trainers to write into the folder it is given.

        Raises:
            EngineError: a trainer does not answer, which is no matter of the checkpoint alone.
        """
        if not self.wait():
            self._failed(step, "the one before is still being written or copied")
            return
        self.failure = None
        self._given_up, self._begun = threading.Event(), time.monotonic()
        try:
            parts = save(self._store.prepare(step))
            for part in parts:
                part.taken()
        except (OSError, CheckpointError) as error:
            self._failed(step, error)
            self._store.discard(step)
            return
        self._ended.clear()
        arguments = (step, copy.deepcopy(state), parts, score, self._given_up)
        threading.Thread(target=self._complete, args=arguments, name="checkpoint", daemon=True).start()

    def wait(self, at_most_s: float | None = None) -> bool:
        """Wait for the checkpoint under way, if there is one; returns whether none is any more.

        Args:
            at_most_s: seconds; None for as long as a checkpoint may take.
        """
        limit = self._begun + self._patience_s - time.monotonic() if at_most_s is None else at_most_s
        return self._ended.wait(max(0.0, limit))

    def close(self) -> None:
        """Give up what is under way."""
        self._given_up.set()
        self.wait(CLOSING_S)

    def _complete(
        self, step: int, state: dict[str, Any], parts: Sequence[Part], score: float | None, given_up: threading.Event
    ) -> None:
        try:
            for part in parts:
                part.written(given_up)
            if given_up.is_set():
                raise CheckpointError("the run ended first")
            self._store.seal(step, state, score)
            if self._storage is not None:
                self._storage.copy(self._store, given_up)
        except Exception as error:  # the loop would never hear of it
            self._failed(step, error)
            self._store.discard(step)
        finally:
            self._ended.set()

    def _failed(self, step: int, reason: Exception | str) -> None:
        self.failure = shortened(reason, 500)
        # A defect keeps its traceback.
        told = None if isinstance(reason, str | OSError | RlhfError) else reason
        logger.warning("no checkpoint after step %d: %s; the run goes on", step, self.failure, exc_info=told)
