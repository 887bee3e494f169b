"""The ledger of a run, by literal cases: what it writes down, and what it refuses."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.driver.ledger import Ledger, LedgerBatch, Sample, digest
from rlhf_ray.errors import EngineError, StageError

BATCH: list[Sample] = [("p0", 0), ("p0", 1), ("p1", 0), ("p1", 1)]


def rows_of(samples: list[Sample], without_score: tuple[Sample, ...] = ()) -> list[dict[str, Any]]:
    return [{"uid": uid, "sample": k, "score": None if (uid, k) in without_score else 0.5} for uid, k in samples]


def ledger_at(path: Path, iteration: int = 0, max_staleness: int = 0) -> Ledger:
    ledger = Ledger(path / "ledger.jsonl", max_staleness)
    ledger.start(iteration)
    return ledger


def go(ledger: Ledger, iteration: int, *, to: str = "trained") -> LedgerBatch:
    """The usual way, up to a step."""
    batch = ledger.draw(iteration, BATCH)
    if to == "drawn":
        return batch
    ledger.dispatch(batch)
    if to == "dispatched":
        return batch
    ledger.complete(batch, BATCH[1:])
    ledger.complete(batch, BATCH[:1])
    if to == "completed":
        return batch
    ledger.score(batch, BATCH)
    if to == "scored":
        return batch
    with ledger.training(iteration, rows_of(BATCH)):
        pass
    return batch


def written(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]
    assert all(row.pop("time") > 1.7e9 for row in rows)
    return rows


def test_a_batch_leaves_a_line_a_step_when_its_last_sample_has_taken_it(tmp_path):
    ledger = ledger_at(tmp_path)
    batch = ledger.draw(0, BATCH)
    ledger.dispatch(batch)
    ledger.complete(batch, [("p1", 1), ("p0", 0)])
    assert [row["event"] for row in written(tmp_path)] == ["started", "drawn", "dispatched"]
    ledger.complete(batch, [("p0", 1), ("p1", 0)])
    ledger.score(batch, BATCH)
    with ledger.training(0, rows_of(BATCH, without_score=(("p0", 1),))):
        assert written(tmp_path)[-1]["event"] == "scored"
    whole = {"iteration": 0, "count": 4, "digest": hashlib.sha256(b"p0/0\np0/1\np1/0\np1/1\n").hexdigest()[:16]}
    assert written(tmp_path) == [
        {"event": "started", "iteration": 0},
        *({"event": event, **whole} for event in ("drawn", "dispatched", "completed", "scored")),
        {"event": "excluded", "iteration": 0, "count": 1, "digest": hashlib.sha256(b"p0/1\n").hexdigest()[:16]},
        {"event": "trained", "iteration": 0, "count": 3, "digest": digest([("p1", 1), ("p1", 0), ("p0", 0)])},
    ]


def test_samples_that_take_the_place_of_others_go_the_same_way_and_are_trained_with_the_rest(tmp_path):
    ledger = ledger_at(tmp_path)
    batch = go(ledger, 0, to="scored")
    ledger.replace(batch, [])
    assert written(tmp_path)[-1]["event"] == "scored"
    spare = [("p7~0", 0)]
    ledger.replace(batch, spare)
    ledger.dispatch(batch)
    ledger.complete(batch, spare)
    ledger.score(batch, spare)
    with ledger.training(0, rows_of([*BATCH, *spare], without_score=(("p0", 1),))):
        pass
    of_spare = {"iteration": 0, "count": 1, "digest": digest(spare)}
    assert written(tmp_path)[5:] == [
        *({"event": event, **of_spare} for event in ("replaced", "dispatched", "completed", "scored")),
        {"event": "excluded", "iteration": 0, "count": 1, "digest": digest([("p0", 1)])},
        {"event": "trained", "iteration": 0, "count": 4, "digest": digest([BATCH[0], *BATCH[2:], *spare])},
    ]


def completed_twice(ledger: Ledger) -> None:
    batch = go(ledger, 0, to="dispatched")
    ledger.complete(batch, [("p0", 0)])
    ledger.complete(batch, [("p1", 0), ("p0", 0)])


def train(ledger: Ledger, iteration: int, rows: list[dict[str, Any]]) -> None:
    with ledger.training(iteration, rows):
        pytest.fail("it was trained on")


BROKEN: dict[str, tuple[Callable[[Ledger], object], str]] = {
    "not dispatched": (
        lambda ledger: ledger.complete(go(ledger, 0, to="drawn"), [("p0", 0)]),
        "iteration 0: p0/0 was completed, and is not dispatched yet;",
    ),
    "not drawn": (
        lambda ledger: ledger.complete(go(ledger, 0, to="dispatched"), [("p7", 0)]),
        "iteration 0: p7/0 was completed, and is not one of its samples;",
    ),
    "completed twice": (completed_twice, "iteration 0: p0/0 was completed, and was completed before;"),
    "completed late": (
        lambda ledger: ledger.complete(go(ledger, 0, to="completed"), [("p0", 0)]),
        "iteration 0: p0/0 was completed, and was completed before;",
    ),
    "dispatched twice": (
        lambda ledger: ledger.dispatch(go(ledger, 0, to="dispatched")),
        "was dispatched, and was dispatched before;",
    ),
    "scored early": (
        lambda ledger: ledger.score(go(ledger, 0, to="dispatched"), BATCH),
        "was scored, and is not completed yet;",
    ),
    "scored twice": (
        lambda ledger: ledger.score(go(ledger, 0, to="scored"), BATCH),
        "was scored, and was scored before;",
    ),
    "replaced early": (
        lambda ledger: ledger.replace(go(ledger, 0, to="completed"), [("p7~0", 0)]),
        "iteration 0: p7~0/0 took the place of others when it was completed;",
    ),
    "replaced by itself": (
        lambda ledger: ledger.replace(go(ledger, 0, to="scored"), BATCH[:1]),
        "iteration 0: p0/0 took the place of others when it was scored;",
    ),
    "scored before others took the place": (
        lambda ledger: (ledger.replace(one := go(ledger, 0, to="scored"), [("p7~0", 0)]), ledger.score(one, BATCH)),
        "was scored, and is not completed yet;",
    ),
    "trained early": (
        lambda ledger: (go(ledger, 0, to="completed"), train(ledger, 0, rows_of(BATCH))),
        "was trained, and is not scored yet;",
    ),
    "trained in part": (
        lambda ledger: (go(ledger, 0, to="scored"), train(ledger, 0, rows_of(BATCH[:1]))),
        "iteration 0: p0/1, p1/0, p1/1 would be neither trained nor excluded;",
    ),
    "trained twice in one iteration": (
        lambda ledger: (go(ledger, 0, to="scored"), train(ledger, 0, rows_of(BATCH + BATCH[:1]))),
        "iteration 0: p0/0 was trained, and was trained before;",
    ),
    "trained twice": (
        lambda ledger: (go(ledger, 0), train(ledger, 0, rows_of(BATCH))),
        "iteration 0: it is not under way;",
    ),
    "drawn twice": (
        lambda ledger: (go(ledger, 0), ledger.draw(0, BATCH)),
        "iteration 0: it was drawn after iteration 0, while iteration 1 is under way",
    ),
    "drawn out of turn": (
        lambda ledger: ledger.draw(1, BATCH),
        "iteration 1: it was drawn after iteration -1, while iteration 0 is under way",
    ),
    "drawn too far ahead": (
        lambda ledger: (ledger.draw(0, BATCH), ledger.draw(1, BATCH)),
        r"iteration 1: it was drawn after iteration 0, while iteration 0 is under way \(`ppo.max_staleness` is 0\)",
    ),
    "a sample drawn twice": (
        lambda ledger: ledger.draw(0, [*BATCH, ("p1", 1)]),
        "iteration 0: 5 samples were drawn, 4 different ones;",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_way_that_is_broken_is_one_error(case, tmp_path):
    act, message = BROKEN[case]
    with pytest.raises(EngineError, match=message):
        act(ledger_at(tmp_path))


def test_iterations_ahead_are_trained_in_their_turn(tmp_path):
    ledger = ledger_at(tmp_path, max_staleness=1)
    go(ledger, 0, to="scored")
    go(ledger, 1, to="scored")
    with pytest.raises(EngineError, match="iteration 2: it was drawn after iteration 1, while iteration 0 is under"):
        ledger.draw(2, BATCH)
    with pytest.raises(EngineError, match="iteration 1: it would be trained when it is the turn of iteration 0"):
        train(ledger, 1, rows_of(BATCH))


def test_a_run_that_goes_on_abandons_what_was_begun_after_its_checkpoint(tmp_path):
    ledger = ledger_at(tmp_path, max_staleness=2)
    steps = ("trained", "trained", "scored", "dispatched")
    batches = [go(ledger, iteration, to=step) for iteration, step in enumerate(steps)]
    before = (tmp_path / "ledger.jsonl").read_bytes()
    # As a crash leaves it: the last line is cut.
    (tmp_path / "ledger.jsonl").write_bytes(before + b'{"event": "compl')

    ledger.start(1)
    assert (tmp_path / "ledger.jsonl").read_bytes().startswith(before + b'{"event": "started"')
    assert written(tmp_path)[-4:] == [
        {"event": "started", "iteration": 1},
        {"event": "abandoned", "iteration": 1, "was": "trained"},
        {"event": "abandoned", "iteration": 2, "was": "scored"},
        {"event": "abandoned", "iteration": 3, "was": "dispatched"},
    ]
    go(ledger, 1)
    # A thread that still samples what was abandoned does not report it as what is drawn again.
    again = [ledger.draw(iteration, BATCH) for iteration in (2, 3)]
    ledger.dispatch(again[1])
    with pytest.raises(EngineError, match="iteration 3: it is not under way"):
        ledger.complete(batches[3], BATCH)
    ledger.close()
    with pytest.raises(EngineError, match="iteration 3: it is not under way"):
        ledger.complete(again[1], BATCH)
    ledger = ledger_at(tmp_path, iteration=2)
    for iteration in (2, 3):
        go(ledger, iteration)
    assert [row["iteration"] for row in written(tmp_path) if row["event"] == "trained"] == [0, 1, 1, 2, 3]
    # Nothing is abandoned that was, and nothing that the checkpoint holds.
    ledger.start(4)
    assert written(tmp_path)[-1] == {"event": "started", "iteration": 4}


def test_an_update_that_fails_is_not_written_as_trained(tmp_path):
    ledger = ledger_at(tmp_path)
    go(ledger, 0, to="scored")
    with pytest.raises(ZeroDivisionError), ledger.training(0, rows_of(BATCH)):
        raise ZeroDivisionError
    assert written(tmp_path)[-1]["event"] == "scored"
    ledger.start(0)
    assert written(tmp_path)[-1] == {"event": "abandoned", "iteration": 0, "was": "scored"}
    go(ledger, 0)


def test_a_line_that_lacks_before_a_checkpoint_is_warned_of(tmp_path, caplog):
    ledger = ledger_at(tmp_path)
    go(ledger, 0)
    ledger.start(2)
    assert "lacks iterations that were trained before 2" in caplog.text


def test_a_damaged_line_is_one_error(tmp_path):
    go(ledger_at(tmp_path), 0)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"iteration": 0', b'"iteration": "x"', 3))
    with pytest.raises(StageError, match=r"ledger.jsonl, line 1: no step of a ledger \(`iteration` is 'x'\)"):
        ledger_at(tmp_path)
