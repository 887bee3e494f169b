"""`rlhf-ray bench iteration|transfer|packing|scaling`: real groups on random weights, beside real bare work."""

import json
from pathlib import Path

import pytest

from rlhf_ray.bench.cells import transfer_cells
from rlhf_ray.bench.iteration import IterationWorkload, bench_iteration, built_in_config
from rlhf_ray.bench.packing import bench_packing
from rlhf_ray.bench.random_models import write_llama
from rlhf_ray.bench.report import driver_line, iteration_lines, packing_lines, transfer_lines
from rlhf_ray.bench.scaling import bench_driver
from rlhf_ray.bench.transfer import bench_transfer
from rlhf_ray.bench.workload import LogNormal
from rlhf_ray.cli import main
from rlhf_ray.placement.cells import load_cells
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.layout import Layout
from rlhf_ray.placement.shapes import find_shape
from rlhf_ray.placement.speeds import Samples
from rlhf_ray.placement.throughput import throughput

TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@pytest.mark.system
def test_an_iteration_and_the_bare_work_in_it_are_measured(ray_cluster: None, tmp_path: Path):
    workload = IterationWorkload(TINY, 6, 8, LogNormal(12, 0.9, 40))
    overrides = ["rollout.vllm.enforce_eager=true", "rollout.kv_cache_gib=0.05", "run.timeout_s=120"]
    # Other tests' groups hold their share of the same cluster.
    overrides += ["rollout.cpus=0.5", *(f"{name}.cpus=0.25" for name in ("policy", "critic", "reference", "reward"))]
    config = built_in_config(workload, "fp32", tmp_path, 3, overrides)
    row = bench_iteration(config, workload)
    assert row["iteration_s"]["min"] > 0
    parts = sum(row["parts_s"][name]["median"] for name in row["parts_s"])
    assert 0.5 * row["iteration_s"]["median"] < parts < 1.5 * row["iteration_s"]["median"]
    assert set(row["bare_parts_s"]) == {
        "generate",
        "reference forward",
        "reward forward",
        "critic forward",
        "policy step",
        "critic step",
    }
    assert all(values["min"] > 0 for values in row["bare_parts_s"].values())
    slowest, quickest = row["iteration_s"]["max"], row["iteration_s"]["min"]
    assert quickest / row["bare_s"]["max"] <= row["share_of_bare"]["median"] <= slowest / row["bare_s"]["min"]
    assert 0 <= row["nobody_busy"]["min"] <= row["nobody_busy"]["max"] < 1
    assert 0 <= row["scoring_hidden"]["min"] <= row["scoring_hidden"]["max"] <= 1
    # Every response has the length that it was to have.
    lengths = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["completions/mean_length"]
    assert lengths == pytest.approx(sum(workload.requests(0).lengths) / 6)
    assert "iteration / bare work" in iteration_lines("tiny", "fp32", row)
    # The speeds of its groups are all that an estimate of it needs, and say what each took.
    (tmp_path / "speeds.json").write_text(json.dumps(row))
    cells, _ = load_cells([tmp_path / "speeds.json"])
    assert {cell.at_once for cell in cells.all if cell.work == "sample"} == {1, 6}
    samples = Samples([8] * 6, workload.requests(0).lengths)
    nodes = [Node(name="here", cpus=2)]
    estimate = throughput(config, Layout([], {}), nodes, samples, cells, find_shape).estimate
    assert all(seconds > 0 for seconds in estimate.parts_s.values())
    assert estimate.generated == sum(samples.responses)


@pytest.mark.system
def test_sampling_ahead_is_measured_beside_the_same_in_turns(ray_cluster: None, tmp_path: Path):
    workload = IterationWorkload(TINY, 6, 8, LogNormal(12, 0.9, 40))
    overrides = ["ppo.max_staleness=1", "placement.cores={rollout: [0], policy: [1], critic: [1]}"]
    overrides += ["rollout.vllm.enforce_eager=true", "rollout.kv_cache_gib=0.05", "run.timeout_s=120"]
    overrides += ["rollout.cpus=0.5", *(f"{name}.cpus=0.25" for name in ("policy", "critic", "reference", "reward"))]
    row = bench_iteration(built_in_config(workload, "fp32", tmp_path, 4, overrides), workload)
    turns, metrics = row["in_turns_s"], (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    longer = max(turns["generate"], turns["rest"])
    assert turns["iteration"]["min"] <= turns["generate"] + turns["rest"] <= turns["iteration"]["max"]
    assert row["share_of_longer"]["max"] == pytest.approx(row["iteration_s"]["max"] / longer)
    # Only the run that is compared with samples in turns.
    assert json.loads(metrics[-1])["sampling/staleness/max"] == 1
    before = (tmp_path / "run-in-turns" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(before[-1])["sampling/staleness/max"] == 0
    assert "iteration / the longer of the two" in iteration_lines("tiny", "fp32", row)


@pytest.mark.system
def test_transfers_are_measured_beside_a_copy_of_the_same_bytes(ray_cluster: None, tmp_path: Path):
    workload = IterationWorkload(TINY, 2, 48, LogNormal(12, 0.9, 40))
    overrides = ["rollout.vllm.enforce_eager=true", "rollout.kv_cache_gib=0.05", "run.timeout_s=120"]
    overrides += ["rollout.cpus=0.5", "policy.cpus=0.5"]
    config = built_in_config(workload, "bf16", tmp_path, 1, overrides)
    row = bench_transfer(config, 2)
    # Embeddings, which are the output layer, too, and two layers: attention, feed-forward, norms; and the last norm.
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 64 + 2 * 128
    assert row["parameters"] == 256 * 128 + 2 * layer + 128
    assert row["bytes"] == 2 * row["parameters"]
    assert 0 < row["copy_s"]["min"] < row["transfer_s"]["min"] < row["warm_up_s"]
    ratio = row["transfer_s"]["median"] / row["copy_s"]["median"]
    assert row["transfer_per_copy"]["median"] == pytest.approx(ratio)
    assert "transfer / copy" in transfer_lines(row)
    (cell,) = transfer_cells(config, row)
    assert (cell.size, cell.seconds, cell.dtype) == (row["bytes"], row["transfer_s"]["median"], "bf16")


@pytest.mark.system
def test_training_on_different_lengths_is_measured_beside_equal_ones(ray_cluster: None, tmp_path: Path):
    response = LogNormal(12, 0.9, 40)
    config = built_in_config(IterationWorkload(TINY, 8, 8, response), "fp32", tmp_path, 1, ["policy.cpus=0.5"])
    row = bench_packing(config, 8, response, 2)
    assert row["responses"] == 8
    assert row["tokens"]["equal"] == pytest.approx(row["tokens"]["drawn"], abs=8)
    assert all(0 < rates["min"] <= rates["max"] for rates in row["tokens_per_s"].values())
    assert 0 < row["share_of_equal"]["min"] <= row["share_of_equal"]["max"]
    assert "different / equal lengths" in packing_lines(row)


@pytest.mark.system
def test_a_driver_serves_simulated_engines(ray_cluster: None):
    few, many = bench_driver([1, 8], 3, 1, tokens_per_s=2000.0)
    assert (few["engines"], few["in_flight"], many["engines"], many["in_flight"]) == (1, 3, 8, 24)
    for row in (few, many):
        assert row["driver_cpu_ms_per_trajectory"] > 0
        assert row["trajectories_per_s"] == pytest.approx(2 * row["in_flight"] / row["seconds"])  # sampled twice
        assert f"{row['engines']} engines" in driver_line(row)


def test_random_models_have_a_tokenizer_of_numbers(tmp_path: Path):
    from transformers import AutoConfig, AutoTokenizer

    folder = write_llama(tmp_path / "model", TINY, scalar=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == TINY["vocab_size"] == AutoConfig.from_pretrained(folder).vocab_size
    assert tokenizer.decode([17, 3]) == "17 3"


def test_an_unknown_workload_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "iteration", "--workload", "w9"])
    assert ended.value.code == 2
    assert "--workload: found 'w9', expected one of w1, w2, w3" in capsys.readouterr().err
