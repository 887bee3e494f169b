"""`rlhf-ray bench rollout` on a real engine beside a real bare one."""

import json
from pathlib import Path
from typing import Any

import pytest
from ppo_runs import Inputs, make_inputs

from rlhf_ray.cli import main
from rlhf_ray.config import dump_config

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("bench"))


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "rollout", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def measured(ray_cluster: None, inputs: Inputs) -> dict[str, Any]:
    """The report of two combinations: responses of one length, and of different ones."""
    config = inputs.folder / "ppo.yaml"
    config.write_text(dump_config(inputs.config("measured")))
    out = inputs.folder / "results" / "bench.json"
    options = ["--concurrency", "8", "--prompt", "200", "--response", "12", "--response", "lognormal:8:0.9:30"]
    options += ["--prompts", "6", "--samples", "2", "--repeats", "2", "--recommend", "throughput"]
    assert bench(str(config), *options, "--out", str(out)) == 0
    return json.loads(out.read_text())


def test_every_combination_has_a_row_with_its_settings(measured: dict[str, Any]):
    rows = measured["rows"]
    assert [row["response_tokens"] for row in rows] == ["12", "lognormal 8, 0.9, at most 30"]
    for row in rows:
        assert (row["engines"], row["tensor_parallel"], row["max_concurrency"]) == (1, 1, 8)
        assert (row["prompt_tokens"], row["requests"]) == ("200", 12)
        assert row["total_tokens"] == row["generated_tokens"] + 12 * 200
    assert rows[0]["generated_tokens"] == 12 * 12
    assert measured["benchmark"] == "rollout"
    assert measured["repeats"] == 2
    assert measured["versions"]["ray"]


def test_rates_follow_from_each_other(measured: dict[str, Any]):
    for row in measured["rows"]:
        rate, total = row["generated_tokens_per_s"], row["total_tokens_per_s"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert total["min"] / rate["min"] == pytest.approx(row["total_tokens"] / row["generated_tokens"])
        # Half a core is reserved for the engine.
        assert row["generated_tokens_per_s_per_unit"]["median"] == pytest.approx(2 * rate["median"])
        for share in (row["share_of_bare"], row["share_of_plain"]):
            assert 0 < share["min"] <= share["median"] <= share["max"]


def test_the_engine_tells_of_waiting_cache_and_idleness(measured: dict[str, Any]):
    for row in measured["rows"]:
        assert 0 < row["first_token_s"]["p50"] <= row["latency_s"]["p50"] <= row["latency_s"]["p99"]
        assert 0 <= row["idle_share"] < 1
        assert 0 < row["kv_cache_peak"] < 1
        assert row["preemptions"] == 0
        # The second sample of a prompt finds the first whole block of 128 tokens; what is sampled anew does not.
        assert row["prefix_hit_share"] == pytest.approx(0.5 * 128 / 200, abs=0.01)


def test_nothing_is_written_into_the_run_directory(measured: dict[str, Any]):
    run_dir = Path(measured["config"]["run"]["dir"])
    assert not run_dir.exists()
    assert list(Path(f"{run_dir}-bench").glob("rollout-0.log"))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--engines", "0"], "--engines: found '0', expected numbers above 0"),
        (["--response", "long"], "--response: found 'long', expected a number of tokens"),
        (["--recommend", "speed"], "--recommend: found 'speed', expected throughput"),
        (["--response", "5000"], "sequences of up to 5032 tokens, and the context of"),
        (["rollout.engine=2"], "rollout.engine"),
        (["rollout.cpus=4000"], "the cluster has 8"),
    ],
)
def test_wrong_input_is_one_error(ray_cluster: None, capsys: pytest.CaptureFixture, arguments: list[str], found: str):
    overrides = [one for one in arguments if "=" in one]
    assert bench(*overrides, *(one for one in arguments if "=" not in one)) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert found in error
