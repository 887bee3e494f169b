"""Damaged and hostile metrics and ledgers of a run: read, or refused with a message that names the file."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import amounts, check_message, fuzz, hostile, outcome, put

from rlhf_ray.driver.ledger import Ledger, ledger_rows
from rlhf_ray.driver.verify import verify
from rlhf_ray.errors import StageError
from rlhf_ray.tracking.rundir import LONGEST_LINE_BYTES, RunDirectory, metric_rows

SAMPLES = [("p0", 0), ("p1", 0)]
METRICS = b"".join(json.dumps({"step": i, "loss": 0.5, "nonfinite": ["a"]}).encode() + b"\n" for i in range(3))
CONFIG = """
run: {dir: x}
data: {path: prompts.jsonl}
policy: {path: policy}
reward: {models: [{path: reward}]}
rollout: {kv_cache_gib: 0.5}
ppo: {iterations: 3, prompts_per_iteration: 2}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of two iterations, the second one twice."""
    put(tmp_path / "config.yaml", CONFIG.encode())
    put(tmp_path / "metrics.jsonl", METRICS.splitlines(keepends=True)[0])
    (tmp_path / "samples").mkdir()
    rows = [{"uid": uid, "sample": k, "score": 0.5, "weight_version": 0, "oldest_version": 0} for uid, k in SAMPLES]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "samples" / "step_000000.parquet")
    ledger = Ledger(tmp_path / "ledger.jsonl", max_staleness=0)
    for first in (0, 1):
        ledger.start(first)
        for iteration in range(first, 2):
            batch = ledger.draw(iteration, SAMPLES)
            ledger.dispatch(batch)
            ledger.complete(batch, SAMPLES)
            ledger.score(batch, SAMPLES)
            with ledger.training(iteration, rows):
                pass
    return tmp_path


@pytest.mark.parametrize("number", amounts(short=300, long=15_000))
def test_damaged_metrics_are_read_or_refused(number, tmp_path):
    """And what is left of them after a rewind is whole."""
    with RunDirectory(tmp_path) as directory:

        def check(content: bytes) -> str:
            put(directory.metrics, content)
            found = outcome(directory.read_metrics, str(directory.metrics))
            assert outcome(lambda: directory.truncate_after(1), str(directory.metrics)) == found
            if found == "read":
                assert all(row["step"] <= 1 for _, row in metric_rows(directory.metrics))
            return found

        fuzz("metrics", hostile([METRICS]), number, check)


@pytest.mark.parametrize("number", amounts(short=300, long=15_000))
def test_a_damaged_ledger_is_read_or_refused(number, run):
    """By its reader, by a run that goes on, and by the verifier, which finds it right or says what is wrong."""
    path = run / "ledger.jsonl"

    def check(content: bytes) -> str:
        put(path, content)
        found = outcome(lambda: ledger_rows(path), str(path))

        def judge() -> None:
            for one in verify(run):
                if one.problem is not None:
                    check_message(one.problem, "")

        assert outcome(judge, str(path)) == found
        assert outcome(lambda: Ledger(path, 0).start(1), str(path)) == found
        if found == "read":
            assert ledger_rows(path)[-1][1]["event"] in ("started", "abandoned")
        return found

    fuzz("ledger", hostile([path.read_bytes()]), number, check)


def test_a_line_without_end_is_refused_after_its_bound(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)  # zeros that take no room on the disk, and would take a terabyte of memory
    with pytest.raises(StageError, match=f"line 1: no metrics object .more than {LONGEST_LINE_BYTES} bytes"):
        metric_rows(path)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "ledger.jsonl")
    with pytest.raises(StageError, match=r"ledger\.jsonl is no file"):
        ledger_rows(tmp_path / "ledger.jsonl")
