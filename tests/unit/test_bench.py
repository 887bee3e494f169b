"""Benchmarks: their workloads, summaries and choices, in numbers."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_ray.bench.report import circumstances, parse_goal, recommend
from rlhf_ray.bench.rollout import percentiles, spread
from rlhf_ray.bench.workload import Fixed, LogNormal, Replayed, Workload, describe, make_workload, parse_lengths
from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.inventory import Node


def test_lengths_as_the_command_line_writes_them(tmp_path):
    assert parse_lengths("128", "--response") == Fixed(128)
    assert parse_lengths("lognormal:48:0.9:384", "--response") == LogNormal(48.0, 0.9, 384)
    (tmp_path / "samples").mkdir()
    for step, lengths in enumerate(([3, 5], [8])):
        pq.write_table(pa.table({"length": lengths}), tmp_path / "samples" / f"step_{step:06d}.parquet")
    replayed = parse_lengths(f"replay:{tmp_path}", "--response")
    assert replayed == Replayed((3, 5, 8))
    assert replayed.largest == 8
    assert set(replayed.draw(100, np.random.default_rng(0))) == {3, 5, 8}


@pytest.mark.parametrize("text", ["0", "-3", "12.5", "much", "lognormal:48:0.9", "lognormal:0:1:10", "replay:"])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ConfigError, match=f"--prompt: found '{text}', expected a number of tokens"):
        parse_lengths(text, "--prompt")


def test_a_run_without_samples_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"--response: {tmp_path} holds no samples"):
        parse_lengths(f"replay:{tmp_path}", "--response")


def test_log_normal_lengths_have_their_median_and_limits():
    drawn = LogNormal(48, 0.9, 384).draw(20_000, np.random.default_rng(1))
    assert np.median(drawn) == pytest.approx(48, rel=0.03)
    assert min(drawn) >= 1
    assert max(drawn) == 384
    # The 84th percentile of a normal distribution is one deviation above its middle.
    assert np.percentile(drawn, 84.13) == pytest.approx(48 * math.exp(0.9), rel=0.05)


def test_another_seed_has_other_prompts_of_the_same_lengths():
    one, other = (make_workload(Fixed(32), LogNormal(8, 1.0, 20), 5, 2, 100, seed) for seed in (0, 1))
    assert one.lengths == other.lengths
    assert len(one.lengths) == 10
    assert [len(prompt) for prompt in one.prompts] == [32] * 5
    assert all(a != b for a, b in zip(one.prompts, other.prompts, strict=True))
    assert all(10 <= token < 100 for prompt in one.prompts for token in prompt)
    assert make_workload(Fixed(32), LogNormal(8, 1.0, 20), 5, 2, 100, 0) == one


def test_tokens_of_a_workload_and_its_parts():
    whole = Workload([[1], [1, 2], [1, 2, 3]], 2, [10, 11, 20, 21, 30, 31])
    assert whole.generated_tokens == 123
    assert whole.total_tokens == 123 + 2 * (1 + 2 + 3)
    assert whole.part(0, 2) == Workload([[1], [1, 2, 3]], 2, [10, 11, 30, 31])
    assert whole.part(1, 2) == Workload([[1, 2]], 2, [20, 21])


def test_summaries():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0}
    assert spread([5.0])["std"] == 0.0
    assert percentiles([float(n) for n in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert describe(Fixed(7)) == "7"
    assert describe(LogNormal(48, 0.9, 384)) == "lognormal 48, 0.9, at most 384"


def row(engines: int, rate: float, p95: float) -> dict:
    return {"engines": engines, "generated_tokens_per_s": {"median": rate}, "latency_s": {"p95": p95}}


def test_the_best_combination_for_a_goal():
    rows = [row(1, 100.0, 0.5), row(2, 180.0, 1.0), row(4, 300.0, 4.0)]
    assert recommend(rows, "throughput")["engines"] == 4
    assert recommend(rows, "p95=1.0")["engines"] == 2
    assert recommend(rows, "p95=0.9")["engines"] == 1
    with pytest.raises(ConfigError, match=r"no combination has a p95 of 0.1 s; the least is 0.50 s"):
        recommend(rows, "p95=0.1")


@pytest.mark.parametrize("goal", ["latency", "p95", "p95=0", "p95=fast"])
def test_what_is_no_goal_is_refused(goal):
    with pytest.raises(ConfigError, match="--recommend: found"):
        parse_goal(goal)


def test_circumstances_name_machine_versions_and_commit():
    found = circumstances([Node(name="one", cpus=2.0)])
    assert found["hardware"] == [{"node": "one", "cpus": 2.0, "gpus": 0, "gpu_memory_gib": None}]
    assert {"ray", "torch", "transformers"} <= found["versions"].keys()
    assert found["processor"]
    assert found["python"].startswith("3.")
