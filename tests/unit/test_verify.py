"""What `rlhf-ray verify` finds in run directories that are right, and in ones where something was lost or doubled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rlhf_ray.cli import main
from rlhf_ray.config import from_dict
from rlhf_ray.driver.checkpoint import CheckpointStore
from rlhf_ray.driver.ledger import Ledger
from rlhf_ray.driver.verify import verify
from rlhf_ray.errors import StageError

NUM_PROMPTS, DRAWN, SAMPLES, STEPS = 5, 3, 2, 4


def rows_of_steps() -> list[list[dict[str, Any]]]:
    """Five prompts, three an iteration: an epoch ends within the second and the fourth. One step of critic warm-up."""
    steps, position = [], 0
    for step in range(STEPS):
        names: list[str] = []
        for _ in range(DRAWN):
            name = f"p{position % NUM_PROMPTS}"
            names.append(name if name not in names else f"{name}+{len(names)}")
            position += 1
        version = max(0, step - 1)
        rest = {"score": 0.5, "weight_version": version, "oldest_version": version}
        steps.append([{"uid": name, "sample": k, **rest} for name in names for k in range(SAMPLES)])
    return steps


def write_run(folder: Path, steps: list[list[dict[str, Any]]], max_staleness: int = 0, spare_prompts: int = 0) -> Path:
    config = from_dict(
        {
            "run": {"dir": str(folder)},
            "data": {"path": "prompts.jsonl"},
            "policy": {"path": "policy"},
            "critic": {"warmup_iterations": 1},
            "reward": {
                "models": [{"path": "reward"}],
                "functions": [{"path": "module:function", "min_scored": 0.5}],
            },
            "rollout": {"kv_cache_gib": 0.5, "samples_per_prompt": SAMPLES},
            "ppo": {
                "iterations": 10,
                "prompts_per_iteration": DRAWN,
                "max_staleness": max_staleness,
                "spare_prompts": spare_prompts,
            },
        },
        "ppo",
    )
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(len(steps))))
    for step, rows in enumerate(steps):
        pq.write_table(pa.Table.from_pylist(rows), folder / "samples" / f"step_{step:06d}.parquet")
    store = CheckpointStore(folder / "checkpoints", keep=2)
    (store.prepare(3) / "weights").write_text("x")
    store.seal(3, {"order": {"num_items": NUM_PROMPTS}})
    return folder


def problems(folder: Path) -> dict[str, str]:
    return {one.subject: one.problem for one in verify(folder) if one.problem}


def test_a_run_that_lost_nothing_passes(tmp_path, capsys):
    run = write_run(tmp_path / "run", rows_of_steps())
    assert problems(run) == {}
    assert [one.found for one in verify(run)] == [
        "4 steps",
        "whole",
        "24 responses",
        "12 drawn of 5, each once an epoch",
        "4 steps, each sampled from the weights of its beginning",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(run)])
    assert ended.value.code == 0 and "right  prompts: 12 drawn of 5" in capsys.readouterr().out


def test_tokens_as_old_as_allowed_pass_and_older_ones_do_not(tmp_path):
    steps = rows_of_steps()
    steps[3][0]["oldest_version"] = 1
    run = write_run(tmp_path / "run", steps, max_staleness=1)
    assert problems(run) == {}
    assert verify(run)[-1].found == "4 steps, each sampled at most 1 updates older than the weights of its beginning"
    steps[3][0]["oldest_version"] = 0
    run = write_run(tmp_path / "other", steps, max_staleness=1)
    assert problems(run)["weights"] == "step 3, prompt p4: tokens of version 0 to 2, and 1 to 2 is allowed"


def doubled(steps: list[list[dict[str, Any]]]) -> None:
    for row in steps[1]:
        row["uid"] = row["uid"].replace("p3", "p1")


def lost_sample(steps: list[list[dict[str, Any]]]) -> None:
    del steps[2][1]


def lost_prompt(steps: list[list[dict[str, Any]]]) -> None:
    del steps[2][:SAMPLES]


def stale(steps: list[list[dict[str, Any]]]) -> None:
    steps[3][0]["oldest_version"] = 1


@pytest.mark.parametrize(
    ("change", "subject", "said"),
    [
        (
            doubled,
            "prompts",
            "by step 1 6 prompts were drawn of 5, which is 1 epochs and 1 prompts, and p0, p1 came 2 times",
        ),
        (lost_sample, "responses", "step 2, prompt p1: samples 0, and each of 2 should be there once"),
        (lost_prompt, "responses", "step 2 has 2 prompts, and 3 were drawn"),
        (stale, "weights", "step 3, prompt p4: tokens of version 1 to 2, and 2 is allowed"),
    ],
)
def test_what_was_lost_or_doubled_is_named(
    tmp_path, capsys, change: Callable[[list[list[dict[str, Any]]]], None], subject: str, said: str
):
    steps = rows_of_steps()
    change(steps)
    run = write_run(tmp_path / "run", steps)
    assert problems(run)[subject] == said
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(run)])
    assert ended.value.code == 1
    assert said in capsys.readouterr().out


def write_ledger(run: Path, steps: list[list[dict[str, Any]]]) -> list[str]:
    """A run of these steps, stopped in its third iteration and continued; the lines of its ledger."""
    ledger = Ledger(run / "ledger.jsonl", max_staleness=0)
    ledger.start(0)
    for step, rows in enumerate([*steps[:3], *steps[2:]]):
        iteration = step if step < 3 else step - 1
        if step == 3:
            ledger.start(2)
        samples = [(row["uid"], row["sample"]) for row in rows]
        batch = ledger.draw(iteration, samples)
        ledger.dispatch(batch)
        ledger.complete(batch, samples)
        ledger.score(batch, samples)
        if step != 2:
            with ledger.training(iteration, rows):
                pass
    return (run / "ledger.jsonl").read_text().splitlines()


def unscored() -> list[list[dict[str, Any]]]:
    """The last iteration has a response without a score."""
    steps = rows_of_steps()
    steps[3][0]["score"] = None
    return steps


def test_a_run_with_a_ledger_that_says_the_same_passes(tmp_path):
    run = write_run(tmp_path / "run", unscored())
    assert [line.split('"')[3] for line in write_ledger(run, unscored())][10:19] == [
        *("trained", "drawn", "dispatched", "completed", "scored", "started", "abandoned", "drawn", "dispatched")
    ]
    assert problems(run) == {}
    last = verify(run)[-1]
    assert last.subject == "ledger"
    assert last.found == "28 lines, 23 samples trained once each, 1 batches abandoned and drawn again"
    # The line that a crash has cut.
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"event": "dra')
    assert problems(run) == {}


def test_responses_in_place_of_others_are_counted_and_are_of_no_epoch(tmp_path):
    steps = unscored()
    steps[3].append(steps[3][1] | {"uid": "p9~0", "sample": 0})
    run = write_run(tmp_path / "run", steps, spare_prompts=2)
    ledger = Ledger(run / "ledger.jsonl", max_staleness=0)
    ledger.start(0)
    for iteration, rows in enumerate(steps):
        samples = [(row["uid"], row["sample"]) for row in rows]
        drawn, spare = samples[: DRAWN * SAMPLES], samples[DRAWN * SAMPLES :]
        batch = ledger.draw(iteration, drawn)
        for together in (drawn, spare):
            ledger.replace(batch, [] if together is drawn else spare)
            if together:
                ledger.dispatch(batch)
                ledger.complete(batch, together)
                ledger.score(batch, together)
        with ledger.training(iteration, rows):
            pass
    assert problems(run) == {}
    found = {one.subject: one.found for one in verify(run)}
    assert found["responses"] == "25 responses"
    assert found["prompts"] == "12 drawn of 5, each once an epoch"
    # One too few, and one too many.
    steps[3][-1]["score"] = None
    lost = write_run(tmp_path / "lost", steps, spare_prompts=2)
    said = "step 3: 1 responses took the place of 2 that have no score, of 2 prompts set aside"
    assert problems(lost) == {"responses": said}
    steps[3][-1]["score"] = steps[3][0]["score"] = 0.5
    more = write_run(tmp_path / "more", steps, spare_prompts=2)
    said = "step 3: 1 responses took the place of 0 that have no score, of 2 prompts set aside"
    assert problems(more) == {"responses": said}


# The lines by their place: 0 started; 1 to 10 two iterations; 11 to 14 the third; 15 started at it; 16 abandoned; 17 to
# 21 the third again; 22 to 27 the fourth, with one sample excluded.
PLANTED: dict[str, tuple[Callable[[list[str]], object], str]] = {
    "start removed": (lambda lines: lines.pop(0), "line 1: iteration 0 was drawn before the run was started"),
    "drawn removed": (lambda lines: lines.pop(1), "line 2: iteration 0 was dispatched when it was not drawn"),
    "completed removed": (lambda lines: lines.pop(3), "line 4: iteration 0 was scored when it was dispatched"),
    "abandoned removed": (lambda lines: lines.pop(16), "line 17: iteration 2 was drawn when it was scored"),
    "second start removed": (lambda lines: lines.pop(15), "line 16: iteration 2 was abandoned, and the run went on"),
    "excluded removed": (lambda lines: lines.pop(26), "of 6 samples 5 were trained or excluded"),
    "last line removed": (lambda lines: lines.pop(), "step 3: the 5 samples of its table are not those that were tr"),
    "iteration removed": (lambda lines: lines.__delitem__(slice(6, 11)), "step 1: the 6 samples of its table are not"),
    "trained doubled": (lambda lines: lines.insert(5, lines[5]), "line 7: iteration 0 was trained when it was trained"),
    "drawn doubled": (lambda lines: lines.insert(1, lines[1]), "line 3: iteration 0 was drawn when it was drawn"),
    "trained again": (lambda lines: lines.extend(lines[1:6]), "line 29: iteration 0 was drawn when it was trained"),
    "other samples": (
        lambda lines: lines.__setitem__(3, lines[3].replace('"digest": "', '"digest": "0')),
        "line 4: iteration 0 was completed with other samples than were drawn",
    ),
    "no samples": (
        lambda lines: lines.__setitem__(3, '{"event": "completed", "iteration": 0}'),
        "line 4: iteration 0 was completed, and the line names no samples",
    ),
    "no step": (
        lambda lines: lines.__setitem__(3, '{"event": "lost", "iteration": 0}'),
        "line 4: iteration 0 was lost when it was dispatched",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_damage_to_the_ledger_is_named(case, tmp_path):
    run = write_run(tmp_path / "run", unscored())
    lines = write_ledger(run, unscored())
    change, said = PLANTED[case]
    change(lines)
    (run / "ledger.jsonl").write_text("".join(f"{line}\n" for line in lines))
    found = problems(run)
    assert list(found) == ["ledger"]
    assert said in found["ledger"]


def test_a_table_that_holds_other_samples_than_were_trained_is_named(tmp_path):
    steps = unscored()
    steps[1][0]["score"] = None
    run = write_run(tmp_path / "run", steps)
    write_ledger(run, unscored())
    assert problems(run) == {
        "ledger": "step 1: the 5 samples of its table are not those that were trained",
    }


def test_a_ledger_that_began_with_a_later_iteration_speaks_of_those_after_it(tmp_path):
    run = write_run(tmp_path / "run", rows_of_steps())
    lines = write_ledger(run, rows_of_steps())
    (run / "ledger.jsonl").write_text("".join(f"{line}\n" for line in [lines[15], *lines[17:]]))
    assert problems(run) == {}


def test_steps_that_are_missing_and_checkpoints_that_are_damaged_are_named(tmp_path):
    run = write_run(tmp_path / "run", rows_of_steps())
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step": 2}\n')
    (run / "checkpoints" / "step_000003" / "weights").write_text("y")
    found = problems(run)
    assert found["metrics"] == "step 2 stands where step 1 should"
    assert found["checkpoint step_000003"] == "weights differs from its checksum"


def test_a_folder_without_a_run_is_one_error(tmp_path):
    with pytest.raises(StageError, match="holds no run"):
        verify(tmp_path)


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    run = write_run(tmp_path / "run", rows_of_steps())
    (run / "samples" / "step_000002.parquet").write_bytes(b"not a table")
    assert "step_000002.parquet" in problems(run)["samples"]
