"""The ledger of a PPO run: the way of each sample from its draw to its update, checked as it goes, and written down.

A sample is one response to a prompt of one iteration: (uid, index). It is drawn, dispatched to the engines, completed,
scored, and then trained, or excluded where a reward function gave no score. Others that take the place of those are
added to the batch, and take the same steps. Each step needs the one before, and none happens twice; what breaks that
ends the run before anything is trained on it.

`ledger.jsonl` has a line for each step of a whole batch, when its last sample has taken it: the iteration, how many
samples, and a digest of them. A process that starts or continues the run adds where it does, and which batches it
abandons: they were begun, or even trained, after the checkpoint that it goes on from, and are drawn again. Nothing that
was written is ever changed.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.errors import EngineError
from rlhf_ray.tracking.rundir import json_rows, write_text

logger = logging.getLogger(__name__)

Sample = tuple[str, int]  # uid of the prompt within its iteration, index among the prompt's samples

WAY = ("drawn", "dispatched", "completed", "scored", "trained")
STARTED, REPLACED, EXCLUDED, ABANDONED = "started", "replaced", "excluded", "abandoned"
MOST_NAMES = 3


@dataclass
class LedgerBatch:
    """The samples of one iteration under way: the step that all have taken, and which have yet to take the next.

    Attributes:
        samples: those that were drawn together.
        before: those that were scored before these took the place of some.
    """

    iteration: int
    samples: frozenset[Sample]
    step: str
    left: set[Sample]
    before: frozenset[Sample] = frozenset()


class Ledger:
    """The samples of one run. Several threads may report to it; each call costs one look-up a sample.

    Args:
        path: the file; it need not exist.
        max_staleness: how many iterations beyond the one under way may be drawn.
    """

    def __init__(self, path: Path, max_staleness: int) -> None:
        self._path = path
        self._max_staleness = max_staleness
        self._batches: dict[int, LedgerBatch] = {}
        self._iteration = 0  # the one under way: the next to be trained
        self._drawn = 0  # the next to be drawn
        self._lock = threading.Lock()

    def start(self, iteration: int) -> None:
        """Go on at `iteration`, whose predecessors are trained; of later ones, what was begun is abandoned."""
        with self._lock:
            rows = ledger_rows(self._path)
            if rows:  # without a last line that a crash has cut, so that the next one stands on its own
                write_text(self._path, "".join(f"{line}\n" for line, _ in rows))
            else:
                self._path.unlink(missing_ok=True)
            steps = last_steps(rows)
            trained = sum(step == WAY[-1] for one, step in steps.items() if one < iteration)
            if steps and trained < iteration - min(steps):
                logger.warning("%s lacks iterations that were trained before %d", self._path, iteration)
            self._write(STARTED, iteration)
            for one, step in sorted(steps.items()):
                if one >= iteration and step != ABANDONED:
                    self._write(ABANDONED, one, was=step)
            self._batches.clear()
            self._iteration = self._drawn = iteration

    def close(self) -> None:
        """Take nothing more: who still reports a batch is told that it is not under way."""
        with self._lock:
            self._batches.clear()

    def draw(self, iteration: int, samples: Iterable[Sample]) -> LedgerBatch:
        """The samples of the next iteration; returns what the further steps are reported of.

        Raises:
            EngineError: as every method, where the order is broken: here, a sample comes twice, or the iteration is out
                of turn, or so far ahead that its tokens could become older than the staleness bound.
        """
        with self._lock:
            listed = list(samples)
            if len(set(listed)) < len(listed) or not listed:
                raise _broken(iteration, f"{len(listed)} samples were drawn, {len(set(listed))} different ones")
            if iteration != self._drawn or iteration > self._iteration + self._max_staleness:
                raise _broken(
                    iteration,
                    f"it was drawn after iteration {self._drawn - 1}, while iteration {self._iteration} is under way "
                    f"(`ppo.max_staleness` is {self._max_staleness})",
                )
            self._drawn += 1
            batch = LedgerBatch(iteration, frozenset(listed), WAY[0], set(listed))
            self._batches[iteration] = batch
            self._write(WAY[0], iteration, listed)
            return batch

    def dispatch(self, batch: LedgerBatch) -> None:
        """All samples of a batch go to the engines."""
        self._take("dispatched", batch, batch.samples)

    def complete(self, batch: LedgerBatch, samples: Iterable[Sample]) -> None:
        """Some of the responses came."""
        self._take("completed", batch, samples)

    def score(self, batch: LedgerBatch, samples: Iterable[Sample]) -> None:
        """Some of the responses are scored, or have been asked for a score in vain."""
        self._take("scored", batch, samples)

    def replace(self, batch: LedgerBatch, samples: Iterable[Sample]) -> None:
        """Others are drawn in place of responses that have been asked for a score in vain; none at all is nothing."""
        added = frozenset(samples)
        if not added:
            return
        with self._lock:
            self._check_under_way(batch)
            known = batch.before | batch.samples
            if batch.step != "scored" or added & known:
                raise _broken(batch.iteration, f"{_named(added)} took the place of others when it was {batch.step}")
            batch.before, batch.samples, batch.step, batch.left = known, added, WAY[0], set(added)
            self._write(REPLACED, batch.iteration, added)

    @contextmanager
    def training(self, iteration: int, rows: list[dict[str, Any]]) -> Iterator[None]:
        """Around the update of an iteration; its samples count as trained after it.

        Args:
            iteration: the one under way.
            rows: `uid`, `sample` and `score` of all its samples; those without a score are excluded.
        """
        trained = [(row["uid"], row["sample"]) for row in rows if row["score"] is not None]
        excluded = [(row["uid"], row["sample"]) for row in rows if row["score"] is None]
        with self._lock:
            if iteration not in self._batches:
                raise _broken(iteration, "it is not under way")
            batch = self._batches[iteration]
            self._check("trained", batch, trained + excluded)
            if batch.left:
                raise _broken(iteration, f"{_named(batch.left)} would be neither trained nor excluded")
            if iteration != self._iteration:
                raise _broken(iteration, f"it would be trained when it is the turn of iteration {self._iteration}")
        yield
        with self._lock:
            del self._batches[iteration]
            self._iteration += 1
            if excluded:
                self._write(EXCLUDED, iteration, excluded)
            self._write(WAY[-1], iteration, trained)

    def _take(self, step: str, batch: LedgerBatch, samples: Iterable[Sample]) -> None:
        """Samples take a step; when the last one has, the batch has taken it."""
        with self._lock:
            self._check_under_way(batch)
            self._check(step, batch, samples)
            if not batch.left:
                batch.step, batch.left = step, set(batch.samples)
                self._write(step, batch.iteration, batch.samples)
                if step == "scored":
                    batch.left |= batch.before  # to be trained together

    def _check_under_way(self, batch: LedgerBatch) -> None:
        # A thread may outlive the run that it worked for, or what its run has abandoned.
        if self._batches.get(batch.iteration) is not batch:
            raise _broken(batch.iteration, "it is not under way")

    @staticmethod
    def _check(step: str, batch: LedgerBatch, samples: Iterable[Sample]) -> None:
        """That all samples of the batch have taken the step before, and these not yet this one."""
        before = WAY[WAY.index(step) - 1]
        for sample in samples:
            if batch.step != before or sample not in batch.left:
                known = "is not one of its samples"
                if sample in batch.samples | batch.before:
                    late = WAY.index(batch.step) >= WAY.index(before)
                    known = f"was {step} before" if late else f"is not {before} yet"
                raise _broken(batch.iteration, f"{_named([sample])} was {step}, and {known}")
            batch.left.remove(sample)

    def _write(self, event: str, iteration: int, samples: Iterable[Sample] | None = None, **more: Any) -> None:
        listed = None if samples is None else list(samples)
        about = {} if listed is None else {"count": len(listed), "digest": digest(listed)}
        row = {"event": event, "iteration": iteration, **about, **more, "time": round(time.time(), 3)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            if event == WAY[-1]:  # a checkpoint may follow that counts on it
                file.flush()
                os.fsync(file.fileno())


def digest(samples: Iterable[Sample]) -> str:
    """The same for the same samples, in whatever order."""
    lines = "".join(f"{uid}/{index}\n" for uid, index in sorted(samples))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def ledger_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Line and object of each step in a ledger, oldest first; none where there is no file.

    Raises:
        StageError: a line other than the last is damaged.
    """
    return list(json_rows(path, {"event": str, "iteration": int}, "step of a ledger"))


def last_steps(rows: list[tuple[str, dict[str, Any]]]) -> dict[int, str]:
    """What came last for each iteration."""
    return {row["iteration"]: row["event"] for _, row in rows if row["event"] != STARTED}


def _named(samples: Iterable[Sample]) -> str:
    listed = sorted(samples)
    more = f" and {len(listed) - MOST_NAMES} more" if len(listed) > MOST_NAMES else ""
    return ", ".join(f"{uid}/{index}" for uid, index in listed[:MOST_NAMES]) + more


def _broken(iteration: int, problem: str) -> EngineError:
    return EngineError(
        f"iteration {iteration}: {problem}; the run stops before it trains on it. The same command continues from the "
        "last checkpoint. Please report this: the ledger exists to rule it out"
    )
