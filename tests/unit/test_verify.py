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
        versions = {"weight_version": version, "oldest_version": version}
        steps.append([{"uid": name, "sample": k, **versions} for name in names for k in range(SAMPLES)])
    return steps


def write_run(folder: Path, steps: list[list[dict[str, Any]]], max_staleness: int = 0) -> Path:
    config = from_dict(
        {
            "run": {"dir": str(folder)},
            "data": {"path": "prompts.jsonl"},
            "policy": {"path": "policy"},
            "critic": {"warmup_iterations": 1},
            "reward": {"models": [{"path": "reward"}]},
            "rollout": {"kv_cache_gib": 0.5, "samples_per_prompt": SAMPLES},
            "ppo": {"iterations": 10, "prompts_per_iteration": DRAWN, "max_staleness": max_staleness},
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
