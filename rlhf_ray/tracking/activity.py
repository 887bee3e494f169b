"""What a process does, as it does it: spans for the timeline of a run, and metrics that Ray exports to Prometheus.

Each process of a run appends its spans to `trace/<actor>.jsonl` in the run directory, one JSON object each: `name`,
`start` and `end` in seconds since the epoch, `process`, its number on its host, and what else was given.
`tracking/timeline.py` reads them. Once a second it also writes what it does now to `trace/<actor>.now`, for
`tracking/status.py`.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import ray
from ray.util.metrics import Counter, Gauge

from rlhf_ray.runtime.chaos import reached
from rlhf_ray.tracking.logs import ACTOR, LOGS
from rlhf_ray.tracking.prometheus_names import METRICS, STATES, TAGS

TRACE = "trace"
NOW = ".now"  # suffix of the files that say what a process does now
NOW_EVERY_S = 1.0
RATE_KEPT_S = 30.0  # for so long after its last tokens a process shows how fast it was; Prometheus reads less often
_WHERE = {"host": socket.gethostname(), "process": os.getpid()}
STATE_VALUES = {state: value for value, state in STATES.items()}


def group_of(actor: str) -> str:
    """The group of a process: `rollout` of `rollout-3` and `rollout-0-part-1`, `reward` of `reward-model_0-1`."""
    return actor.partition("-")[0]


@dataclass(eq=False)
class Call:
    """Something that a process was asked to do and has not finished.

    Attributes:
        name: what is done, in a word or two.
        start: in seconds since the epoch.
        owed: requests in it that are not answered.
    """

    name: str
    start: float
    owed: int = 1


class Activity:
    """The recorder of one process. Its methods may be called from any thread.

    Args:
        actor: its name, such as `policy-0` or `driver`.
        run_dir: the run's directory; None records no spans.
    """

    def __init__(self, actor: str, run_dir: Path | None) -> None:
        self._file: TextIO | None = None
        if run_dir is not None:
            (run_dir / TRACE).mkdir(exist_ok=True)
            # Line by line, so that a killed process leaves what it did.
            self._file = (run_dir / TRACE / f"{actor}.jsonl").open("a", encoding="utf-8", buffering=1)
        tags = dict(zip(TAGS, (group_of(actor), actor, run_dir.name if run_dir else ""), strict=True))
        self._metrics: dict[str, Any] = {}
        if ray.is_initialized():
            kinds = {"gauge": Gauge, "counter": Counter}
            for name, metric in METRICS.items():
                self._metrics[name] = kinds[metric.kind](name, metric.description, tag_keys=TAGS)
                self._metrics[name].set_default_tags(tags)
        self._lock = threading.RLock()  # a generator that is thrown away ends its span in whatever thread is about
        self._open: list[Call] = []
        self._since = time.time()  # when the process became busy, or idle
        # By a clock that is never put back: when it became busy last, until when its metrics are right, and when its
        # last tokens came. And how many came since it became busy.
        self._busy_from = self._right_until = self._last_tokens = time.monotonic()
        self._tokens = 0
        self._now: dict[str, Any] = {}  # last value of each metric
        self._set("rlhf_state", STATE_VALUES["idle"])
        self._closed = threading.Event()
        if run_dir is not None:
            threading.Thread(target=self._tell, args=(run_dir / TRACE / f"{actor}{NOW}",), daemon=True).start()

    def close(self) -> None:
        """Say no more what the process does now."""
        self._closed.set()

    @contextmanager
    def busy(self, name: str, *, tokens: int = 0, responses: int = 0, **details: Any) -> Iterator[Call]:
        """The block is one span; the process is busy while any is open.

        Args:
            name: what is done, in a word or two.
            tokens: sampled, scored or trained on in it.
            responses: likewise.
            details: what else the span says, as JSON.
        """
        call = Call(name, time.time())
        with self._lock:
            self._catch_up()
            if not self._open:
                self._since, self._busy_from, self._tokens = call.start, self._right_until, 0
                self._set("rlhf_state", STATE_VALUES["busy"])
            self._open.append(call)
            self._set_queue()
        try:
            reached(name)
            yield call
        finally:
            end = time.time()
            with self._lock:
                self.count_tokens(tokens, responses)
                self._open.remove(call)
                self._set_queue()
                if not self._open:
                    self._set("rlhf_state", STATE_VALUES["idle"])
                    self._since = end
                if self._file is not None:
                    row = {"name": name, "start": call.start, "end": end, "process": _WHERE["process"], **details}
                    self._file.write(json.dumps(row) + "\n")

    def owes(self, call: Call, requests: int) -> None:
        """So many requests of a call under way, which `busy` gave, are not answered; without a word it is one."""
        with self._lock:
            call.owed = requests
            self._set_queue()

    def count_tokens(self, tokens: int, responses: int) -> None:
        """Add what a span that is still open has sampled."""
        with self._lock:
            self._add("rlhf_tokens_total", tokens)
            self._add("rlhf_responses_total", responses)
            self._tokens += tokens
            self._catch_up(tokens > 0)
        if tokens:
            reached("tokens")

    def count_iteration(self) -> None:
        """One more iteration is done."""
        with self._lock:
            self._add("rlhf_iterations_total", 1)

    def hold_version(self, version: int) -> None:
        """The process holds these policy weights now, after a transfer."""
        with self._lock:
            self._set("rlhf_weight_version", version)
            self._add("rlhf_weight_transfers_total", 1)

    def _catch_up(self, new_tokens: bool = False) -> None:
        """Bring the metrics that change as time passes up to now. The lock is held.

        Once a second and not only at a span's end: a step of half an hour would else be read as idleness, and then as
        half an hour of work in no time.
        """
        now = time.monotonic()
        if new_tokens:
            self._last_tokens = now
        if self._open:
            self._add("rlhf_busy_seconds_total", now - self._right_until)
        if self._open and self._tokens:
            self._set("rlhf_tokens_per_second", self._tokens / max(now - self._busy_from, 1e-6))
        elif "rlhf_tokens_per_second" in self._now and now - self._last_tokens > RATE_KEPT_S:
            self._set("rlhf_tokens_per_second", 0.0)
        self._right_until = now

    def _tell(self, file: Path) -> None:
        """Write what the process does now, again and again: a file that is old is a process that is gone or hangs."""
        while not self._closed.is_set():
            with self._lock:
                self._catch_up()
                name, since = (self._open[-1].name, self._open[-1].start) if self._open else ("idle", self._since)
                now = {"doing": name, "since": since, "told": time.time(), **_WHERE, **self._now}
            with suppress(OSError):  # the directory is gone, or its disk is full: the run itself will say so
                temporary = file.with_name(f".{file.name}.tmp")
                temporary.write_text(json.dumps(now) + "\n", encoding="utf-8")
                temporary.replace(file)  # whole for its readers; that it outlives a power cut is not needed
            self._closed.wait(NOW_EVERY_S)

    def _set_queue(self) -> None:
        self._set("rlhf_queue", sum(call.owed for call in self._open))

    def _set(self, name: str, value: float) -> None:
        self._now[name] = value
        if name in self._metrics:
            self._metrics[name].set(value)

    def _add(self, name: str, value: float) -> None:
        self._now[name] = self._now.get(name, 0) + value
        if name in self._metrics and value > 0:
            self._metrics[name].inc(value)


@cache
def activity() -> Activity:
    """This actor's recorder, as the environment from the driver names it; without one it records no spans."""
    logs = os.environ.get(LOGS)
    return Activity(os.environ.get(ACTOR, "process"), Path(logs).parent if logs else None)
