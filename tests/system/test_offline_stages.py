"""SFT, reward model and DPO from files to model folders: they learn, resume, and refuse bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.config import dump_config, from_dict
from rlhf_ray.errors import ConfigError, DataError, ModelError, ResourceError, RlhfError, StageError
from rlhf_ray.stages.dpo import train_dpo
from rlhf_ray.stages.reward_model import train_reward_model
from rlhf_ray.stages.sft import train_sft

pytestmark = pytest.mark.system

# What a run measures of itself, which no two runs have in common.
TIMES = {"step_time", "tokens_per_second"}
# The reply repeats the digit of the prompt and then tosses a coin, x or y: of its three tokens (digit, coin, end),
# one has the entropy of a coin and the others none.
ENTROPY = math.log(2) / 3


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Data files: demonstrations whose entropy is known, and pairs that the first word of the reply tells apart."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [
        {"prompt": f"{i % 10} ", "chosen": "quick" + " fox" * (i % 3), "rejected": "lazy" + " fox" * (i // 3 % 3)}
        for i in range(60)
    ]
    return {
        "demonstrations": write_rows(
            folder / "demonstrations.jsonl",
            [{"prompt": f"{digit} ", "completion": f"{digit}{coin}"} for digit in range(10) for coin in "xy"],
        ),
        "pairs": write_rows(folder / "pairs.jsonl", pairs[:40]),
        "held_out": write_rows(folder / "held_out.jsonl", pairs[40:]),
    }


def sft_values(model: str, path: str, run_dir: Path) -> dict[str, Any]:
    return {
        "run": {"dir": str(run_dir), "seed": 1, "keep_checkpoints": 1},
        "data": {"path": path, "eval_path": path, "max_tokens": 16},
        "model": {"path": model},
        "training": {"micro_batch_tokens": 32, "schedule": "linear", "warmup_steps": 4},
        "sft": {"learning_rate": 1e-2, "epochs": 24, "batch_size": 8},
    }


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def sft_run(ray_cluster, models, data, tmp_path_factory) -> Path:
    """The run directory of a finished SFT."""
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    folder = train_sft(from_dict(sft_values(models["causal"], data["demonstrations"], run_dir), "sft"))
    assert folder == run_dir / "model"
    return run_dir


def test_sft_reaches_the_entropy_of_its_task(sft_run):
    metrics = metrics_of(sft_run)
    assert [row["step"] for row in metrics] == list(range(60))
    assert metrics[0]["loss"] > 4.0
    assert metrics[-1]["eval/loss"] == pytest.approx(ENTROPY, abs=0.02)
    assert metrics[-1]["eval/loss"] > ENTROPY - 1e-5
    assert metrics[-1]["epoch"] == 24
    summary = json.loads((sft_run / "summary.json").read_text())
    assert (summary["stage"], summary["steps"], summary["demonstrations"]) == ("sft", 60, 20)
    assert summary["eval/loss"] == metrics[-1]["eval/loss"]
    assert [path.name for path in (sft_run / "checkpoints").iterdir()] == ["step_000060"]


def test_sft_model_answers_as_it_was_taught(sft_run):
    model = AutoModelForCausalLM.from_pretrained(sft_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(sft_run / "model")
    for digit in range(10):
        prompt = tokenizer(f"{digit} ", return_tensors="pt", add_special_tokens=False).input_ids
        reply = model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
        assert tokenizer.decode(reply) in (f"{digit}x<|end|>", f"{digit}y<|end|>")


def test_finished_run_is_left_as_it_is(sft_run, models, data):
    def times() -> dict[Path, int]:
        files = [path for path in sft_run.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if path.suffix != ".log" and path.name != ".lock"}

    before = times()
    assert len(before) > 10
    train_sft(from_dict(sft_values(models["causal"], data["demonstrations"], sft_run), "sft"))
    assert times() == before


@pytest.fixture(scope="module")
def stopped_run(models, data, tmp_path_factory) -> tuple[Path, int]:
    """The directory of a run that Ctrl-C, which a terminal sends to Ray's processes too, stopped; the steps it took."""
    folder = tmp_path_factory.mktemp("stopped")
    run_dir = folder / "run"
    file = folder / "config.yaml"
    file.write_text(dump_config(from_dict(sft_values(models["causal"], data["demonstrations"], run_dir), "sft")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "rlhf_ray", "sft", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    steps = len(metrics_of(run_dir))
    assert 2 <= steps < 60
    assert f"stopped by a signal after step {steps} of 60" in errors
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{steps:06d}"]
    assert not (run_dir / "model").exists() and not (run_dir / "summary.json").exists()
    return run_dir, steps


def continued(stopped: Path, run_dir: Path, model: str, path: str, **changes: dict[str, Any]) -> None:
    shutil.copytree(stopped, run_dir)
    values = sft_values(model, path, run_dir)
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    train_sft(from_dict(values, "sft"))


def test_run_stopped_by_ctrl_c_continues_to_the_same_end(ray_cluster, stopped_run, sft_run, models, data, tmp_path):
    run_dir = tmp_path / "run"
    continued(stopped_run[0], run_dir, models["causal"], data["demonstrations"])
    assert metrics_of(run_dir) == metrics_of(sft_run)
    weights = load_file(run_dir / "model" / "model.safetensors")
    expected = load_file(sft_run / "model" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


def test_run_continues_on_another_number_of_processes(ray_cluster, stopped_run, sft_run, models, data, tmp_path):
    """And at another ZeRO stage, in other micro-batches: the next steps are the same but for rounding."""
    run_dir = tmp_path / "run"
    changes = {"group": {"processes": 2, "cpus": 0.5}, "training": {"zero_stage": 3, "micro_batch_tokens": 16}}
    continued(stopped_run[0], run_dir, models["causal"], data["demonstrations"], **changes)
    steps = stopped_run[1]
    found, expected = metrics_of(run_dir), metrics_of(sft_run)
    assert [row["step"] for row in found] == list(range(60))
    assert found[:steps] == expected[:steps]
    for one, other in zip(found[steps : steps + 3], expected[steps : steps + 3], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["learning_rate"] == other["learning_rate"]
        assert one["epoch"] == other["epoch"]
    assert found[-1]["eval/loss"] == pytest.approx(ENTROPY, abs=0.02)


def test_reward_model_separates_pairs_and_its_evaluation_is_kept(ray_cluster, models, data, tmp_path):
    values = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"path": data["pairs"], "eval_path": data["held_out"], "max_tokens": 32},
        "model": {"path": models["causal"]},
        "training": {"micro_batch_tokens": 64},
        "group": {"processes": 2},
        "reward_model": {"learning_rate": 3e-3, "epochs": 4, "batch_size": 8, "eval_every": 10},
    }
    folder = train_reward_model(from_dict(values, "reward"))
    metrics = metrics_of(tmp_path / "run")
    assert len(metrics) == 20
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=0.5)
    assert metrics[-1]["accuracy"] > 0.95
    assert ["eval/accuracy" in row for row in metrics] == [step in (9, 19) for step in range(20)]

    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["pairs"] == 20
    assert result["accuracy"] == metrics[-1]["eval/accuracy"] > 0.95
    assert 0.0 <= result["ece"] < 0.3
    assert sum(one["count"] for one in result["reliability"]) == 20
    assert result["accuracy_by_file"] == {data["held_out"]: result["accuracy"]}
    buckets = result["accuracy_by_length"]
    assert buckets.keys() == {"all", "chosen_longer", "chosen_shorter", "similar"}
    assert sum(bucket["count"] for bucket in buckets.values()) == 2 * 20
    assert all(bucket["accuracy"] > 0.9 for bucket in buckets.values() if bucket["count"])
    assert result["mean_margin"] > 0
    assert (tmp_path / "run" / "reliability.png").stat().st_size > 1000

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for line in Path(data["pairs"]).read_text().splitlines():
        row = json.loads(line)
        for name in ("chosen", "rejected"):
            # Prompt and reply are tokenised apart, as a policy continues a prompt.
            ids = [*tokenizer(row["prompt"]).input_ids, *tokenizer(row[name] + "<|end|>").input_ids]
            with torch.no_grad():
                scores.append(float(model(torch.tensor([ids])).logits))
    assert model.config.score_mean == pytest.approx(float(torch.tensor(scores).mean()), abs=1e-4)
    assert model.config.score_std == pytest.approx(float(torch.tensor(scores).std()), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "first_loss"),
    [
        ({"beta": 0.1}, math.log(2)),
        ({"beta": 0.1, "label_smoothing": 0.1}, math.log(2)),
        ({"beta": 0.1, "loss": "ipo"}, 25.0),
    ],
    ids=["dpo", "conservative", "ipo"],
)
def test_dpo_raises_the_accuracy_of_its_rewards(ray_cluster, models, data, tmp_path, settings, first_loss):
    values = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"path": data["pairs"], "eval_path": data["held_out"], "max_tokens": 32},
        "model": {"path": models["causal"]},
        "training": {"micro_batch_tokens": 64},
        "dpo": {"learning_rate": 1e-3, "epochs": 3, "batch_size": 8, **settings},
    }
    folder = train_dpo(from_dict(values, "dpo"))
    metrics = metrics_of(tmp_path / "run")
    # Policy and reference are one before the first update.
    assert metrics[0]["loss"] == pytest.approx(first_loss, rel=1e-4)
    assert metrics[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert metrics[-1]["loss"] < first_loss
    assert metrics[-1]["eval/rewards/accuracies"] > 0.9
    assert metrics[-1]["eval/rewards/margins"] > 0.1
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def bad(models, data, tmp_path) -> Any:
    """Runs SFT with changed values; gives the class and message of the error, which must leave nothing behind."""

    def run(**changes: dict[str, Any]) -> tuple[type[RlhfError], str]:
        values = sft_values(models["causal"], data["demonstrations"], tmp_path / "run")
        for section, change in changes.items():
            values.setdefault(section, {}).update(change)
        with pytest.raises(RlhfError) as error:
            train_sft(from_dict(values, "sft"))
        assert not (tmp_path / "run").exists()
        return error.type, str(error.value)

    return run


def changed_tokenizer(models: dict[str, str], folder: Path, *removed: str) -> dict[str, str]:
    shutil.copytree(models["causal"], folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            entries = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({key: entries[key] for key in entries if key not in removed}))
    (folder / "chat_template.jinja").unlink()
    return {"path": str(folder)}


def test_missing_data_file(bad, tmp_path):
    missing = str(tmp_path / "absent.jsonl")
    kind, message = bad(data={"path": missing})
    assert kind is DataError
    assert missing in message


def test_malformed_row_is_named_by_file_and_line(bad, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1 ", "completion": "1x"}, '{"prompt": "2 ", "compl'])
    kind, message = bad(data={"path": path})
    assert kind is DataError
    assert f"{path}:2: not JSON" in message
    assert "set `data.malformed` to `skip`" in message


def test_row_without_completion_is_named_by_file_and_line(bad, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1 ", "completion": "1x"}, {"prompt": "2 "}])
    kind, message = bad(data={"path": path})
    assert kind is DataError
    assert f"{path}:2: " in message
    assert "completion" in message


def test_empty_data_set(bad, tmp_path):
    kind, message = bad(data={"path": write_rows(tmp_path / "rows.jsonl", [])})
    assert kind is DataError
    assert message == f"{tmp_path / 'rows.jsonl'} holds no rows: name a file with at least one"


def test_rows_that_are_all_too_long(bad):
    kind, message = bad(data={"max_tokens": 3})
    assert kind is DataError
    assert "raise `data.max_tokens` = 3 (the longest: 5)" in message


def test_tokenizer_without_end_of_sequence(bad, models, tmp_path):
    kind, message = bad(model=changed_tokenizer(models, tmp_path / "model", "eos_token"))
    assert kind is ModelError
    assert "has no end-of-sequence token" in message
    assert "Set 'eos_token' in its tokenizer_config.json" in message


def test_conversations_without_chat_template(bad, models, tmp_path):
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1x"}]}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    model = changed_tokenizer(models, tmp_path / "model", "chat_template")
    kind, message = bad(model=model, data={"path": path, "eval_path": None})
    assert kind is ModelError
    assert "the tokenizer has no chat template: set `model.chat_template` to" in message


def test_path_and_scratch_together(bad):
    kind, message = bad(model={"scratch": {}})
    assert kind is ConfigError
    assert "model.scratch: given, and so is `model.path`" in message
    assert "keep one of the two" in message


def test_sequences_longer_than_the_context(bad, models):
    kind, message = bad(data={"max_tokens": 300}, training={"micro_batch_tokens": 300})
    assert kind is ConfigError
    assert message == (
        f"data.max_tokens: sequences of up to 300 tokens, and the context of {models['causal']} is 256; lower it"
    )


def test_missing_model_folder(bad, tmp_path):
    kind, message = bad(model={"path": str(tmp_path / "absent")})
    assert kind is ModelError
    assert f"The model folder {tmp_path / 'absent'} does not exist" in message


def test_too_few_cpus(bad, ray_cluster):
    kind, message = bad(group={"processes": 16})
    assert kind is ResourceError
    assert "CPU: the run needs 16 (group 16 x 1) and the cluster has 8; lower group.cpus from 1 to 0.5" in message


def test_other_data_in_the_directory_of_a_run_is_refused(sft_run, models, data):
    (sft_run / "summary.json").rename(sft_run / "kept.json")  # as if it were not finished
    try:
        values = sft_values(models["causal"], data["pairs"], sft_run)
        with pytest.raises(StageError, match=r"holds another run: data\.eval_path was .*; data\.path was .*; restore"):
            train_sft(from_dict(values, "sft"))
    finally:
        (sft_run / "kept.json").rename(sft_run / "summary.json")


def test_configuration_may_be_corrected_after_an_error(ray_cluster, models, data, tmp_path):
    """Nothing was trained, so the directory holds no run yet and takes the corrected one, of other data."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1 ", "completion": 7}])
    values = sft_values(models["causal"], path, tmp_path / "run")
    with pytest.raises(DataError):
        train_sft(from_dict(values, "sft"))
    values["data"] |= {"path": data["demonstrations"], "eval_path": None}
    values["sft"] |= {"epochs": 1, "batch_size": 20}
    values["training"] |= {"warmup_steps": 0}
    train_sft(from_dict(values, "sft"))
    assert len(metrics_of(tmp_path / "run")) == 1
