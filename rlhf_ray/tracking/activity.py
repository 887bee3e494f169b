"""What a process does, as it does it: spans for the timeline of a run, and metrics that Ray exports to Prometheus.

Each process of a run appends its spans to `trace/<actor>.jsonl` in the run directory, one JSON object each: `name`,
`start` and `end` in seconds since the epoch, and what else was given. `tracking/timeline.py` reads them.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import ray
from ray.util.metrics import Counter, Gauge

from rlhf_ray.tracking.logs import ACTOR, LOGS
from rlhf_ray.tracking.prometheus_names import METRICS, STATES, TAGS

TRACE = "trace"
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
        self._under_way = 0
        self._since = 0.0
        self._set("rlhf_state", STATE_VALUES["idle"])

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
        if self._under_way == 0:
            self._since = start
            self._set("rlhf_state", STATE_VALUES["busy"])
        self._under_way += 1
        self._set("rlhf_queue", self._under_way)
        try:
            yield
        finally:
            end = time.time()
            self._under_way -= 1
            self._set("rlhf_queue", self._under_way)
            if self._under_way == 0:
                self._set("rlhf_state", STATE_VALUES["idle"])
                self._add("rlhf_busy_seconds_total", end - self._since)
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

    def _set(self, name: str, value: float) -> None:
        if name in self._metrics:
            self._metrics[name].set(value)

    def _add(self, name: str, value: float) -> None:
        if name in self._metrics and value > 0:
            self._metrics[name].inc(value)


@cache
def activity() -> Activity:
    """This actor's recorder, as the environment from the driver names it; without one it records no spans."""
    logs = os.environ.get(LOGS)
    return Activity(os.environ.get(ACTOR, "process"), Path(logs).parent if logs else None)
