"""What a process does, as it does it: spans for the timeline of a run, and metrics that Ray exports to Prometheus.

Each process of a run appends its spans to `trace/<actor>.jsonl` in the run directory, one JSON object each: `name`,
`start` and `end` in seconds since the epoch, and what else was given. `tracking/timeline.py` reads them. Once a second
it also writes what it does now to `trace/<actor>.now`, for `tracking/status.py`.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import ray
from ray.util.metrics import Counter, Gauge

from rlhf_ray.tracking.logs import ACTOR, LOGS
from rlhf_ray.tracking.prometheus_names import METRICS, STATES, TAGS

TRACE = "trace"
NOW = ".now"  # suffix of the files that say what a process does now
NOW_EVERY_S = 1.0
_WHERE = {"host": socket.gethostname(), "process": os.getpid()}
STATE_VALUES = {state: value for value, state in STATES.items()}


class Activity:
    """The recorder of one process.

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
        tags = dict(zip(TAGS, (actor.rpartition("-")[0] or actor, actor, run_dir.name if run_dir else ""), strict=True))
        self._metrics: dict[str, Any] = {}
        if ray.is_initialized():
            kinds = {"gauge": Gauge, "counter": Counter}
            for name, metric in METRICS.items():
                self._metrics[name] = kinds[metric.kind](name, metric.description, tag_keys=TAGS)
                self._metrics[name].set_default_tags(tags)
        self._open: dict[int, tuple[str, float]] = {}  # spans under way: name and start
        self._since = time.time()
        self._now: dict[str, Any] = {}  # last value of each metric
        self._set("rlhf_state", STATE_VALUES["idle"])
        self._closed = threading.Event()
        if run_dir is not None:
            threading.Thread(target=self._tell, args=(run_dir / TRACE / f"{actor}{NOW}",), daemon=True).start()

    def close(self) -> None:
        """Say no more what the process does now."""
        self._closed.set()

    @contextmanager
    def busy(self, name: str, *, tokens: int = 0, responses: int = 0, **details: Any) -> Iterator[None]:
        """The block is one span; the process is busy while any is open.

        Args:
            name: what is done, in a word or two.
            tokens: sampled, scored or trained on in it.
            responses: likewise.
            details: what else the span says, as JSON.
        """
        start = time.time()
        if not self._open:
            self._since = start
            self._set("rlhf_state", STATE_VALUES["busy"])
        span = object()
        self._open[id(span)] = (name, start)
        self._set("rlhf_queue", len(self._open))
        try:
            yield
        finally:
            end = time.time()
            del self._open[id(span)]
            self._set("rlhf_queue", len(self._open))
            if not self._open:
                self._set("rlhf_state", STATE_VALUES["idle"])
                self._add("rlhf_busy_seconds_total", end - self._since)
                self._since = end
            if tokens:
                self._set("rlhf_tokens_per_second", tokens / max(end - start, 1e-6))
            self._add("rlhf_tokens_total", tokens)
            self._add("rlhf_responses_total", responses)
            if self._file is not None:
                self._file.write(json.dumps({"name": name, "start": start, "end": end, **details}) + "\n")

    def count_tokens(self, tokens: int, responses: int) -> None:
        """Add what a span that is still open has sampled."""
        self._add("rlhf_tokens_total", tokens)
        self._add("rlhf_responses_total", responses)

    def count_iteration(self) -> None:
        """One more iteration is done."""
        self._add("rlhf_iterations_total", 1)

    def hold_version(self, version: int) -> None:
        """The process holds these policy weights now, after a transfer."""
        self._set("rlhf_weight_version", version)
        self._add("rlhf_weight_transfers_total", 1)

    def _tell(self, file: Path) -> None:
        """Write what the process does now, again and again: a file that is old is a process that is gone or hangs."""
        while not self._closed.is_set():
            under_way = list(self._open.values())
            name, since = under_way[-1] if under_way else ("idle", self._since)
            now = {"doing": name, "since": since, "told": time.time(), **_WHERE, **self._now}
            with suppress(OSError):  # the directory is gone, or its disk is full: the run itself will say so
                temporary = file.with_name(f".{file.name}.tmp")
                temporary.write_text(json.dumps(now) + "\n", encoding="utf-8")
                temporary.replace(file)  # whole for its readers; that it outlives a power cut is not needed
            self._closed.wait(NOW_EVERY_S)

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
