"""PPO on the real engines: one whole run, its directory, its resumption, and its engines coming and going."""

import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ppo_runs import ITERATIONS, TOLERANCE, Inputs, make_inputs, nothing_left, processes_of, rows_of
from tiny_models import make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.config import PPOConfig, dump_config, from_dict, load_config
from rlhf_ray.driver import ppo
from rlhf_ray.driver.control import ask_for_engines, wanted_engines
from rlhf_ray.driver.verify import verify
from rlhf_ray.errors import RunStopped, StageError
from rlhf_ray.placement.groups import Placement
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.stages.ppo import train_ppo
from rlhf_ray.tracking.logs import ACTOR
from rlhf_ray.tracking.metrics import check_known
from rlhf_ray.tracking.timeline import cut, idle_shares, iterations, read_timeline

pytestmark = pytest.mark.system

# What the clock decides; every other number of a run is decided by its configuration.
CLOCK = ("time/", "rollout/tokens_per_second")
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("ppo"))


def weights_of(folder: str | Path, model_class: Any = AutoModelForCausalLM) -> dict[str, Tensor]:
    return dict(model_class.from_pretrained(folder).named_parameters())


# ---- one whole run


def main_config(inputs: Inputs, name: str, **sections: dict[str, Any]) -> PPOConfig:
    """A reward model and a function, running normalisation, a checkpoint an iteration."""
    return inputs.config(
        name,
        **sections,
        run={"dir": str(inputs.folder / name), "checkpoint_every": 1, "keep_checkpoints": 2},
        reward={
            "functions": [{"path": "reward_functions:num_tokens", "weight": 0.1}],
            "normalize": "running",
            "clip": 3.0,
            "missing_eos_penalty": 0.5,
        },
    )


@pytest.fixture(scope="module")
def whole_run(ray_cluster: None, inputs: Inputs) -> PPOConfig:
    """The configuration of a run that went through without a stop."""
    config = main_config(inputs, "whole")
    with nothing_left():
        assert train_ppo(config) == Path(config.run.dir) / "model"
    return config


def test_before_the_first_update_policy_reference_and_engine_agree(whole_run: PPOConfig):
    first = rows_of(whole_run)[0]
    assert first["step"] == 0
    assert abs(first["objective/kl"]) < TOLERANCE
    assert abs(first["objective/non_score_reward"]) < TOLERANCE
    assert first["sampling/sampling_logp_difference/max"] < TOLERANCE
    assert first["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=TOLERANCE)
    samples = pq.read_table(Path(whole_run.run.dir) / "samples" / "step_000000.parquet").to_pylist()
    assert all(abs(row["kl"]) < TOLERANCE for row in samples)


def test_engine_and_trainer_agree_in_every_iteration_while_the_policy_moves_away(whole_run: PPOConfig):
    rows = rows_of(whole_run)
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] < TOLERANCE
        assert row["rollout/probe_difference"] < TOLERANCE
        # One epoch of one minibatch: the policy that is trained is the one that sampled.
        assert row["val/ratio"] == pytest.approx(1.0, abs=1e-6)
        assert row["policy/approxkl_avg"] == 0.0
        assert row["policy/clipfrac_avg"] == 0.0
    assert rows[-1]["objective/kl"] > 1e-3


def test_metrics_have_one_object_an_iteration_with_known_keys_and_finite_values(whole_run: PPOConfig):
    rows = rows_of(whole_run)
    assert [row["step"] for row in rows] == list(range(ITERATIONS))
    for row in rows:
        check_known(key for key in row if key != "step")
        assert all(math.isfinite(value) for value in row.values())
        assert row["lr/policy"] == row["lr/critic"] == 3e-3
        assert row["grad_norm/policy"] > 0
        assert row["grad_norm/critic"] > 0
        total = row["objective/scores"] + row["objective/non_score_reward"]
        assert row["objective/rlhf_reward"] == pytest.approx(total)
        phases = sum(row[f"time/{name}"] for name in ("generate", "score", "advantages", "train", "transfer"))
        assert phases <= row["time/iteration"]
    assert rows[-1]["data/epoch"] == pytest.approx(ITERATIONS * 8 / 20)


def test_the_logged_version_is_the_one_that_sampled(whole_run: PPOConfig):
    assert [row["rollout/weight_version"] for row in rows_of(whole_run)] == list(range(ITERATIONS))


def test_the_sampled_table_holds_every_response_and_reward_component(whole_run: PPOConfig):
    files = sorted((Path(whole_run.run.dir) / "samples").glob("*.parquet"))
    assert [file.name for file in files] == [f"step_{step:06d}.parquet" for step in range(ITERATIONS)]
    for row, file in zip(rows_of(whole_run), files, strict=True):
        samples = pq.read_table(file).to_pylist()
        assert len(samples) == 16
        assert len({(sample["uid"], sample["completion"]) for sample in samples}) > 8
        for sample in samples:
            assert sample["prompt"].startswith("jump over ")
            assert sample["rewards/num_tokens"] == sample["length"]
            assert math.isfinite(sample["rewards/model"])
            assert sample["weight_version"] == row["step"]
            assert sample["finish_reason"] in ("stop", "length")
        assert sum(sample["score"] for sample in samples) / 16 == pytest.approx(row["objective/scores"], abs=1e-5)
        assert sum(sample["kl"] for sample in samples) / 16 == pytest.approx(row["objective/kl"], abs=1e-4)
        assert sum(sample["length"] for sample in samples) / 16 == pytest.approx(row["completions/mean_length"])


def test_every_prompt_token_and_checkpoint_is_accounted_for(whole_run: PPOConfig):
    assert {one.subject: one.problem for one in verify(Path(whole_run.run.dir)) if one.problem} == {}


def test_the_run_directory_is_complete(whole_run: PPOConfig):
    folder = Path(whole_run.run.dir)
    assert load_config(folder / "config.yaml", [], "ppo") == whole_run
    names = ("driver", "policy-0", "critic-0", "rollout-0", "reference-0", "reward-0", "reward-num_tokens")
    assert {f"{name}.log" for name in names} <= {path.name for path in (folder / "logs").iterdir()}
    best = max(range(ITERATIONS), key=lambda step: rows_of(whole_run)[step]["objective/scores"]) + 1
    kept = {f"step_{step:06d}" for step in (ITERATIONS - 1, ITERATIONS, best)}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == kept
    summary = json.loads((folder / "summary.json").read_text())
    last = rows_of(whole_run)[-1]
    assert summary["stage"] == "ppo"
    assert summary["iterations"] == ITERATIONS
    assert summary["objective/scores"] == last["objective/scores"]
    assert summary["objective/kl"] == last["objective/kl"]
    assert Path(summary["model"]) == folder / "model"


def test_the_results_load_in_transformers_and_every_parameter_has_changed(whole_run: PPOConfig, inputs: Inputs):
    folder = Path(whole_run.run.dir)
    for start, end, model_class in (
        (inputs.policy, folder / "model", AutoModelForCausalLM),
        (inputs.reward, folder / "critic", AutoModelForSequenceClassification),
    ):
        before, after = weights_of(start, model_class), weights_of(end, model_class)
        assert before.keys() == after.keys()
        for name, weight in after.items():
            assert torch.isfinite(weight).all()
            assert not torch.equal(weight, before[name]), f"{name} has not changed"
        tokenizer = AutoTokenizer.from_pretrained(end)
        assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
        assert tokenizer.chat_template == make_tokenizer().chat_template
    assert (folder / "model" / "README.md").is_file()


def test_the_timeline_shows_what_every_process_did(whole_run: PPOConfig):
    timeline = read_timeline(Path(whole_run.run.dir))
    assert set(timeline) == {
        "driver",
        "policy-0",
        "critic-0",
        "rollout-0",
        "reference-0",
        "reward-0",
        "reward-num_tokens",
    }
    done = iterations(timeline)
    assert list(done) == list(range(ITERATIONS))
    window = done[1]
    names = {actor: {span.name for span in spans} for actor, spans in cut(timeline, window.start, window.end).items()}
    assert {"generate", "transfer"} <= names["rollout-0"]
    assert {"step", "transfer"} <= names["policy-0"]
    assert {"step", "forward"} <= names["critic-0"]
    assert names["reference-0"] == {"log-probabilities"}
    assert names["reward-0"] == {"scores"}
    shares = idle_shares(timeline, window.start, window.end)
    assert all(0 < share < 1 for share in shares.values())


def test_a_finished_run_is_left_as_it_is(whole_run: PPOConfig):
    before = (Path(whole_run.run.dir) / "metrics.jsonl").read_bytes()
    assert train_ppo(whole_run) == Path(whole_run.run.dir) / "model"
    assert (Path(whole_run.run.dir) / "metrics.jsonl").read_bytes() == before


# ---- stopping and continuing


def listens_at(process: int) -> list[str]:
    """The addresses at which a process takes connections."""
    try:
        ends = psutil.Process(process).net_connections("inet")
    except psutil.Error:  # it has just ended
        return []
    return [end.laddr.ip.removeprefix("::ffff:") for end in ends if end.status == psutil.CONN_LISTEN]


@pytest.fixture(scope="module")
def interrupted_run(whole_run: PPOConfig, inputs: Inputs) -> dict[str, Any]:
    """The same run, asked to stop, then killed, then continued to its end; what happened on the way.

    Its first process has secrets in its environment, and a folder of its own for Ray's logs.
    """
    config = main_config(inputs, "interrupted", tracking={"wandb": "offline"})
    file = inputs.folder / "interrupted.yaml"
    file.write_text(dump_config(config))
    checkpoints = Path(config.run.dir) / "checkpoints"

    of_ray = Path(tempfile.mkdtemp(prefix="ray"))  # a short name: sockets are in it
    process = start(file, **SECRETS, RAY_TMPDIR=str(of_ray))
    await_checkpoint(process, checkpoints, 1)
    family = [process.pid, *descendants(process.pid)]
    commands = [" ".join(psutil.Process(pid).cmdline()) for pid in family]
    listening = [(pid, at) for pid in family for at in listens_at(pid)]
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    story: dict[str, Any] = {"config": config, "exit_code": process.returncode, "output": output, "commands": commands}
    story["listening"] = listening
    story["files"] = {path: path.read_bytes() for path in files_below(Path(config.run.dir), of_ray)}
    shutil.rmtree(of_ray)
    story["steps_when_stopped"] = len(rows_of(config))
    story["checkpoint_when_stopped"] = max(path.name for path in checkpoints.glob("step_*"))
    story["left_after_stop"] = survivors(family)

    process = start(file)
    await_checkpoint(process, checkpoints, story["steps_when_stopped"] + 1)
    family = [process.pid, *descendants(process.pid)]
    process.kill()
    process.communicate(timeout=120)
    story["left_after_kill"] = survivors(family)

    with nothing_left():
        train_ppo(config)
    return story


SECRET = secrets.token_hex(20)
SECRETS = {"WANDB_API_KEY": SECRET, "HF_TOKEN": f"hf_{SECRET}", "RAY_AUTH_TOKEN": SECRET, "A_PASSWORD": SECRET}


def files_below(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def start(config: Path, **variables: str) -> subprocess.Popen:
    """The run in a process of its own, with a Ray of its own."""
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_ray", "ppo", str(config)],
        env=environment | {"PYTHONPATH": path} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def await_checkpoint(process: subprocess.Popen, checkpoints: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while not any(int(path.name[-6:]) >= step for path in checkpoints.glob("step_*")):
        assert time.monotonic() < deadline, "no checkpoint in time"
        assert process.poll() is None, f"the run ended early:\n{process.communicate()[0]}"
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


# Ray's own helpers, which notice a raylet that was killed in their own time.
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def survivors(pids: list[int], patience_s: float = 30.0) -> list[str]:
    """Command lines of those processes that still run when the patience is over."""
    deadline = time.monotonic() + patience_s
    while True:
        alive = []
        for pid in pids:
            try:
                process = psutil.Process(pid)
                command = " ".join(process.cmdline()).strip()
                if process.status() != psutil.STATUS_ZOMBIE and not command.startswith(RAY_AGENTS):
                    alive.append(command[:120])
            except psutil.NoSuchProcess:
                pass
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.2)


def test_a_run_on_a_machine_of_its_own_is_reached_from_there_alone(interrupted_run: dict[str, Any]):
    assert len({pid for pid, _ in interrupted_run["listening"]}) > 6  # of groups; Ray's own, too
    assert {at for _, at in interrupted_run["listening"]} <= {"127.0.0.1", "::1"}


def test_sigterm_writes_a_checkpoint_and_exits_with_its_own_code(interrupted_run: dict[str, Any]):
    assert interrupted_run["exit_code"] == RunStopped.exit_code == 143
    assert "the same command continues" in interrupted_run["output"]
    assert "Traceback" not in interrupted_run["output"]
    steps = interrupted_run["steps_when_stopped"]
    assert 1 <= steps < ITERATIONS
    assert interrupted_run["checkpoint_when_stopped"] == f"step_{steps:06d}"


def test_secrets_of_the_environment_are_in_no_file_argument_or_message(interrupted_run: dict[str, Any]):
    run = Path(interrupted_run["config"].run.dir)
    files: dict[Path, bytes] = interrupted_run["files"]
    names = [str(path.relative_to(run)) for path in files if path.is_relative_to(run)]
    # What is searched: logs, traces, checkpoints and W&B's folder, and all that Ray keeps of its session.
    for folder in ("logs/", "trace/", "checkpoints/", "wandb/", "metrics.jsonl", "ledger.jsonl"):
        assert any(name.startswith(folder) for name in names), folder
    assert any(path.name == "raylet.out" for path in files)
    assert [str(path) for path, content in files.items() if SECRET.encode() in content] == []
    assert any("raylet" in command for command in interrupted_run["commands"])
    assert [command for command in interrupted_run["commands"] if SECRET in command] == []
    assert SECRET not in interrupted_run["output"]


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_no_process_outlives_its_driver(interrupted_run: dict[str, Any], end: str):
    assert interrupted_run[f"left_after_{end}"] == []


def test_a_stopped_and_killed_run_ends_with_the_numbers_of_one_that_was_not(
    whole_run: PPOConfig, interrupted_run: dict[str, Any]
):
    expected, found = rows_of(whole_run), rows_of(interrupted_run["config"])
    assert [row["step"] for row in found] == list(range(ITERATIONS))
    for one, other in zip(expected, found, strict=True):
        for row in (one, other):
            for key in [key for key in row if key.startswith(CLOCK)]:
                del row[key]
        assert other == one
    for step in range(ITERATIONS):
        name = f"samples/step_{step:06d}.parquet"
        tables = [pq.read_table(Path(c.run.dir) / name) for c in (whole_run, interrupted_run["config"])]
        assert tables[0].equals(tables[1])


def test_nothing_is_lost_or_doubled_by_a_stop_and_a_kill(interrupted_run: dict[str, Any]):
    found = verify(Path(interrupted_run["config"].run.dir))
    assert {one.subject: one.problem for one in found if one.problem} == {}
    assert any(one.subject.startswith("checkpoint") for one in found)
    assert any(one.subject == "ledger" and "64 samples trained once each" in one.found for one in found)


def test_a_stopped_and_killed_run_ends_with_the_same_weights_bit_for_bit(
    whole_run: PPOConfig, interrupted_run: dict[str, Any]
):
    for name, model_class in (("model", AutoModelForCausalLM), ("critic", AutoModelForSequenceClassification)):
        expected = weights_of(Path(whole_run.run.dir) / name, model_class)
        found = weights_of(Path(interrupted_run["config"].run.dir) / name, model_class)
        assert all(torch.equal(weight, found[key]) for key, weight in expected.items())


def test_a_run_directory_of_another_run_is_refused_and_left_alone(whole_run: PPOConfig, inputs: Inputs):
    folder = Path(whole_run.run.dir)
    (folder / "summary.json").rename(folder / "summary.aside")
    before = (folder / "metrics.jsonl").read_bytes()
    try:
        values = whole_run.model_dump(mode="json")
        values["run"]["seed"] = 4
        with pytest.raises(StageError, match=r"holds another run: run.seed was 3 and is now 4; .*run.dir"):
            train_ppo(from_dict(values, "ppo"))
    finally:
        (folder / "summary.aside").rename(folder / "summary.json")
    assert (folder / "metrics.jsonl").read_bytes() == before


# ---- engines that join, leave and die

# What is asked for before each iteration. In the second, the process of one engine is killed while it samples, and
# another is said to have got a node that it must not have; in the third, one is killed after it has sampled.
SIZES = [1, 3, 3, 2]
KILLED_IN = 1
DOUBLED = 2
KILLED_IDLE_IN = 2
CHANGING = (*CLOCK, "rollout/engines")


@pytest.fixture(scope="module")
def elastic_run(ray_cluster: None, inputs: Inputs) -> tuple[PPOConfig, list[int]]:
    """The whole run, scaled before each iteration, and how many engines served at the beginning of each.

    Newcomers are waited for, so that no clock decides the outcome.
    """
    config = main_config(inputs, "elastic")
    sizes = iter(SIZES)
    serving: list[int] = []
    sample = RolloutPool.generate

    def ask(run_dir: Path) -> int | None:
        ask_for_engines(run_dir, next(sizes))
        return wanted_engines(run_dir)

    def wait(pool: RolloutPool) -> bool:
        starting = [up for _, up in pool._joining.values()]
        return bool(starting) and bool(ray.wait(starting, num_returns=len(starting), timeout=240)[0])

    def generate(pool: RolloutPool, requests: Any) -> Iterator[Any]:
        iteration = len(serving)
        serving.append(len(pool.engines))
        stream = sample(pool, requests)
        first = next(stream)
        if iteration == KILLED_IN:
            logs = str(Path(config.run.dir) / "logs")
            (of_engine,) = [pid for pid in processes_of(logs) if psutil.Process(pid).environ()[ACTOR] == "rollout-1"]
            os.kill(of_engine, signal.SIGKILL)
        yield first
        yield from stream
        if iteration == KILLED_IDLE_IN:
            ray.kill(pool._serving[2])

    placed: list[int] = []

    def doubled(placement: Placement, name: str, rank: int) -> bool:
        placed.append(rank)
        return rank == DOUBLED and placed.count(rank) == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Placement, "doubled", doubled)
        patch.setattr(ppo, "wanted_engines", ask)
        patch.setattr(RolloutPool, "newcomers_ready", wait)
        patch.setattr(RolloutPool, "generate", generate)
        train_ppo(config)
    return config, serving


@pytest.fixture(scope="module")
def elastic(elastic_run: tuple[PPOConfig, list[int]]) -> PPOConfig:
    return elastic_run[0]


def test_engines_join_leave_and_are_replaced(elastic_run: tuple[PPOConfig, list[int]]):
    assert elastic_run[1] == [1, 2, 3, 2]


def test_nothing_is_lost_or_repeated_and_every_number_is_that_of_one_engine(whole_run: PPOConfig, elastic: PPOConfig):
    for expected, found in zip(rows_of(whole_run), rows_of(elastic), strict=True):
        for row in (expected, found):
            for key in [key for key in row if key.startswith(CHANGING)]:
                del row[key]
        assert found == expected
    for step in range(ITERATIONS):
        name = f"samples/step_{step:06d}.parquet"
        tables = [pq.read_table(Path(config.run.dir) / name) for config in (whole_run, elastic)]
        assert tables[0].equals(tables[1])


def test_the_directory_of_a_scaled_run_accounts_for_everything(elastic: PPOConfig):
    assert {one.subject: one.problem for one in verify(Path(elastic.run.dir)) if one.problem} == {}


def test_no_process_of_a_run_outlives_it(elastic: PPOConfig):
    logs = str(Path(elastic.run.dir) / "logs")
    deadline = time.monotonic() + 20
    while left := processes_of(logs):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_only_a_running_ppo_run_is_scaled(elastic: PPOConfig, tmp_path: Path):
    with pytest.raises(StageError, match="no process works on the run in"):
        ask_for_engines(Path(elastic.run.dir), 2)
    with pytest.raises(StageError, match="holds no run; name the directory of a running PPO run"):
        ask_for_engines(tmp_path, 2)
    (tmp_path / "config.yaml").write_text("run: {dir: x}\nrollout: {}\nplacement: {share: [[policy, rollout]]}\n")
    with pytest.raises(StageError, match="share their places, one beside each process of other groups"):
        ask_for_engines(tmp_path, 2)
    (tmp_path / "config.yaml").write_text("run:\n  dir: x\nsft: {}\n")
    with pytest.raises(StageError, match="only PPO has engines"):
        ask_for_engines(tmp_path, 2)
