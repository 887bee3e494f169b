"""The estimate of an iteration, against numbers worked out by hand."""

import json
from pathlib import Path

import pytest

from rlhf_ray.bench.cells import alone_seconds, rollout_cells
from rlhf_ray.config.load import from_dict
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.placement.cells import Cell, Cells, forward_flops, load_cells, matrix_flops, step_flops
from rlhf_ray.placement.flow import Job, Places, ends
from rlhf_ray.placement.forecast import forecast_lines
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.layout import Layout, Seat
from rlhf_ray.placement.schedule import decoding, fullest, groups_of
from rlhf_ray.placement.shapes import ModelShape
from rlhf_ray.placement.speeds import Samples
from rlhf_ray.placement.throughput import Throughput, throughput
from rlhf_ray.tracking.timeline import Span

# One layer of 10 parameters; a head of 2 x 3.
SHAPE = ModelShape(
    parameters=16,
    hidden=2,
    layers=1,
    attention_width=2,
    kv_width=2,
    intermediate=1,
    vocab=3,
    gated=True,
    head_parameters=0,
    largest_layer=10,
)
FOUR = Samples([10] * 4, [10] * 4)


def test_operations_of_a_token():
    assert matrix_flops(SHAPE, "causal") == 2 * (10 + 6)
    assert matrix_flops(SHAPE, "scalar") == 2 * (10 + 2)
    # Sequences of 4 and 2 tokens, 3 of the 6 in responses: squares 16 + 4; attention 2 * 1 layer * 2 wide * 20 / 6.
    sequences = [(2, 2), (1, 1)]
    assert forward_flops(SHAPE, "causal", sequences) == pytest.approx(20 + 12 * 3 / 6 + 80 / 6)
    assert forward_flops(SHAPE, "scalar", sequences) == pytest.approx(20 + 4 + 80 / 6)
    assert (step_flops(5, recomputed=False), step_flops(5, recomputed=True)) == (15, 20)


def test_a_model_of_another_size_takes_time_in_proportion_or_between_two_measured():
    one = Cells([Cell("step", "causal", "fp32", "CPU", 100.0, 2.0)], "a.json")
    assert one.seconds("step", "causal", "fp32", "CPU", 50.0) == 1.0
    two = Cells([Cell("step", "causal", "fp32", "CPU", size, seconds) for size, seconds in ((1, 1), (100, 10))], "")
    assert two.seconds("step", "causal", "fp32", "CPU", 10.0) == pytest.approx(10**0.5)
    assert two.seconds("step", "causal", "fp32", "CPU", 200.0) == pytest.approx(20)
    assert two.seconds("step", "causal", "fp32", "CPU", 0.5) == pytest.approx(0.5)
    twice = Cells([Cell("step", "causal", "fp32", "CPU", 100.0, seconds) for seconds in (2.0, 4.0)], "")
    assert twice.seconds("step", "causal", "fp32", "CPU", 100.0) == 3.0


def test_a_step_of_an_engine_follows_the_number_of_responses():
    cells = Cells([Cell("sample", "causal", "fp32", "CPU", 8.0, s, n) for n, s in ((2, 3.0), (10, 11.0))], "")
    assert [cells.step_seconds("fp32", "CPU", 8.0, n) for n in (1, 2, 6, 10, 20)] == [3.0, 3.0, 7.0, 11.0, 22.0]
    assert cells.step_seconds("fp32", "CPU", 16.0, 6) == 14.0


def test_what_was_not_measured_is_an_error_that_names_what_was():
    cells = Cells([Cell("step", "causal", "fp32", "CPU", 1.0, 1.0)], "a.json")
    with pytest.raises(ConfigError, match=r"'step' .* causal model in bf16 on a GPU, and a.json holds fp32 on a CPU"):
        cells.seconds("step", "causal", "bf16", "GPU", 1.0)
    with pytest.raises(
        ConfigError, match=r"'forward' .* and a.json holds none; measure .* bench iteration --dtype bf16"
    ):
        cells.seconds("forward", "causal", "bf16", "GPU", 1.0)


def test_files_without_speeds_are_refused(tmp_path: Path):
    for text in ("{", "[]", '{"benchmark": "packing"}', '{"cells": []}', '{"cells": [{"work": "step"}]}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ConfigError, match=r"--throughput: .*a\.json holds no measured speeds"):
            load_cells([tmp_path / "a.json"])
    with pytest.raises(ConfigError, match=r"b\.json holds no measured speeds"):
        load_cells([tmp_path / "b.json"])


def test_processes_that_share_cores_are_slower_by_what_is_lacking():
    three = {name: {"cores": 1.0} for name in "abc"}
    places = Places({"cores": 2.0}, three)
    # All at two thirds; a and b are done after 1.5 s, when c has half of its work left.
    assert ends([Job("a", 1.0), Job("b", 1.0), Job("c", 2.0)], places) == pytest.approx([1.5, 1.5, 2.5])
    # The second job of a waits for b, and for nobody's cores.
    assert ends([Job("a", 1.0), Job("b", 3.0), Job("a", 1.0, after=1)], places) == pytest.approx([1.0, 3.0, 4.0])
    assert ends([Job("d", 1.0), Job("d", 2.0)], places) == [1.0, 3.0]


def test_an_engine_takes_the_next_response_as_one_ends():
    # Prompts take 2 s; two steps of 2 s; the longer one goes on alone, with steps of 1 s.
    assert decoding([2, 4], [10, 10], 2, float, 0.1) == pytest.approx([6.0, 8.0])
    assert decoding([2, 4], [10, 10], 1, float, 0.1) == pytest.approx([3.0, 8.0])
    # The third begins as the first ends, and its prompt is the second's.
    assert decoding([1, 3, 2], [10, 10, 0], 2, float, 0.1) == pytest.approx([4.0, 8.0, 8.0])


def test_the_fullest_process():
    assert fullest([20] * 4, 3) == 40
    assert fullest([5, 4, 3, 3], 2) == 8
    assert fullest([5], 4) == 5


def config_of(*overrides: str) -> PPOConfig:
    """Five groups on a GPU each."""
    values = {
        "run": {"dir": "none"},
        "data": {"path": "none", "max_tokens": 10},
        "policy": {"path": "model", "gpus": 1},
        "critic": {"init": "policy", "gpus": 1},
        "reference": {"gpus": 1},
        "reward": {"models": [{"path": "model"}], "gpus": 1},
        "rollout": {"gpus": 1, "max_new_tokens": 10},
        "ppo": {"iterations": 1, "prompts_per_iteration": 4},
    }
    config = from_dict(values, "ppo", overrides)
    assert isinstance(config, PPOConfig)
    return config


def speeds(device: str = "GPU", samples: Samples = FOUR, prompt_s: float = 0.05) -> Cells:
    """Seconds a unit of each kind of work: with `FOUR` (80 tokens in all), sampling takes 12 s and a transfer 3 s."""
    causal = forward_flops(SHAPE, "causal", samples.sequences)
    scalar = forward_flops(SHAPE, "scalar", samples.sequences)
    rows = [
        ("sample", "causal", matrix_flops(SHAPE, "causal"), 1.0, 4),
        ("prompt", "causal", matrix_flops(SHAPE, "causal"), prompt_s, 0),
        ("forward", "causal", causal, 0.1, 0),
        ("forward", "scalar", scalar, 0.05, 0),
        ("step", "causal", 3 * causal, 0.25, 0),
        ("step", "scalar", 3 * scalar, 0.2, 0),
        ("transfer", "causal", 64.0, 3.0, 0),
    ]
    return Cells(
        [Cell(work, head, "fp32", device, size, seconds, n) for work, head, size, seconds, n in rows],  # type: ignore
        "a.json",
    )


def found(config: PPOConfig, cells: Cells | None = None, samples: Samples = FOUR, cores: float = 64.0) -> Throughput:
    nodes = [Node(name="one", cpus=cores)]
    return throughput(config, Layout([], {}), nodes, samples, cells or speeds(), lambda _: SHAPE)


def test_groups_on_gpus_of_their_own():
    one = found(config_of())
    assert one.estimate.parts_s == pytest.approx(
        {"sampling": 12, "scoring": 8, "training": 20, "transfer": 3, "driver": 0}
    )
    assert one.estimate.iteration_s == pytest.approx(43)
    assert one.estimate.tokens_per_s == pytest.approx(40 / 43)
    busy = {"rollout": 12, "reference": 8, "reward": 4, "critic": 4 + 16, "policy": 20}
    assert one.estimate.busy_s == pytest.approx(busy)
    assert one.estimate.limiting == "policy"
    # Two policies: the critic's 16 s. Two engines: two prompts less, and steps as long. The scorers get one chunk.
    gains = {option.groups: option.saved_s for option in one.options}
    expected = {("policy",): 4, ("rollout",): 1, ("critic",): 0, ("reference",): 0, ("reward",): 0}
    assert gains == pytest.approx(expected, abs=1e-9)
    assert one.options[0].groups == ("policy",)


def test_sampling_that_takes_longest():
    one = found(config_of("rollout.max_concurrency=1"))
    # One response after the other: 4 x (0.5 + 10 steps of 1 s, as below the smallest number that was measured). The
    # scorers' only chunk begins with the last.
    assert one.estimate.parts_s["sampling"] == pytest.approx(42)
    assert one.estimate.limiting == "rollout"
    assert one.options[0].groups == ("rollout",)
    assert one.options[0].saved_s == pytest.approx(21)


def test_scorers_work_while_others_are_sampled():
    samples = Samples([10] * 4, [1, 4, 7, 10])
    chunks = config_of("reference.micro_batch_tokens=20")
    cells = speeds(samples=samples, prompt_s=0.0)
    one = found(chunks, cells, samples)
    # Chunks of 25 and 37 tokens end with the second response and with the last, after 4 and 10 s; the reference takes
    # 2.5 and 3.7 s.
    assert one.estimate.parts_s["sampling"] == pytest.approx(10)
    assert one.estimate.parts_s["scoring"] == pytest.approx(3.7)
    assert one.options[-1].saved_s == pytest.approx(0)
    # At a quarter of that speed (0.4 s a token, the mean of two cells) the first takes 10 s, and the second waits. A
    # second process takes it over: 10 + 14.8 s then.
    slower = Cell("forward", "causal", "fp32", "GPU", forward_flops(SHAPE, "causal", samples.sequences), 0.7)
    two = found(chunks, Cells([*cells.all, slower], ""), samples)
    assert two.estimate.parts_s["scoring"] == pytest.approx(4 + 0.4 * 62 - 10)
    assert {option.groups: option.saved_s for option in two.options}["reference",] == pytest.approx(4.0)


def test_sampling_ahead_of_training():
    one = found(config_of("ppo.max_staleness=1"))
    # The critic's values are a part of training now, before both steps. Eight responses at a time take 2 s a step.
    assert one.estimate.bounds_s == pytest.approx(
        {
            "training": 4 + 20 + 3,
            "way of a batch": (12 + 8 + 27) / 2,
            "rollout": 10 + 2 + 3,
            "reference": 8,
            "reward": 4,
        }
    )
    assert (one.estimate.iteration_s, one.estimate.limiting) == (pytest.approx(27), "policy")
    slow = found(config_of("ppo.max_staleness=1", "rollout.max_concurrency=1"))
    # 40 steps of 1 s and the prompts' 2 s, and a transfer that stops the engine; the way takes (42 + 8 + 27) / 2.
    assert (slow.estimate.iteration_s, slow.estimate.limiting) == (pytest.approx(45), "rollout")
    many = found(config_of("ppo.max_staleness=3"))
    assert many.estimate.bounds_s["way of a batch"] == pytest.approx(47 / 4)


def test_trainers_on_one_gpu_take_as_long_as_both():
    shared = ['placement.share=[["policy", "critic"]]', "policy.gpus=0.5", "critic.gpus=0.5"]
    one = found(config_of(*shared))
    assert one.estimate.parts_s["training"] == pytest.approx(36)
    assert one.estimate.limiting == "policy"
    assert one.options[0].groups == ("critic", "policy")
    assert one.options[0].iteration_s == pytest.approx(12 + 8 + 18 + 3)
    apart = found(config_of(*shared[1:]))
    assert apart.estimate.parts_s["training"] == pytest.approx(20)
    # Fractions that end up on one GPU share it, too.
    seats = Layout([Seat("policy", 0, 0, 0, (0,)), Seat("critic", 0, 0, 0, (0,)), Seat("reward", 0, 0, 0, (1,))], {})
    groups = groups_of(config_of(*shared[1:]), seats)
    assert groups["policy"].together == groups["critic"].together == ("critic", "policy")
    assert groups["reward"].together == ("reward",)


def test_engines_and_trainers_in_turns():
    shared = ['placement.share=[["policy", "critic", "reference", "reward", "rollout"]]']
    shared += [f"{name}.gpus=0.2" for name in ("policy", "critic", "reference", "reward", "rollout")]
    one = found(config_of(*shared))
    # 12 s of sampling; all of the scorers' 8 + 4 + 4 s; all of the trainers' 20 + 16 s.
    assert one.estimate.iteration_s == pytest.approx(12 + 16 + 36 + 3)
    (option,) = one.options
    assert len(option.groups) == 5
    assert option.iteration_s == pytest.approx(11 + 14 + 18 + 3)  # the reference's and the reward's chunk is on one GPU
    assert any("take turns" in note for note in one.notes)


def test_several_steps_compute_the_old_log_probabilities_first():
    one = found(config_of("ppo.epochs=2", "ppo.minibatches=2"))
    assert one.estimate.parts_s["training"] == pytest.approx(8 + 2 * 20)


def test_fewer_cores_than_threads():
    cpu = [f"{name}.gpus=0" for name in ("policy", "critic", "reference", "reward", "rollout")]
    cpu += ["rollout.kv_cache_gib=1", "rollout.cpus=2"]
    one = found(config_of(*cpu), speeds("CPU"), cores=2)
    # The engine has both cores, for 6 s; then three scorers of one core each: a sum of 16 s on two cores, of which the
    # reference, whose 8 s are the longest, has one to itself in the end.
    assert one.estimate.parts_s["sampling"] == pytest.approx(6)
    assert one.estimate.parts_s["scoring"] == pytest.approx(6 + 4)
    assert one.estimate.parts_s["training"] == pytest.approx(20)
    gains = {option.groups: option.iteration_s for option in one.options}
    assert gains[("all groups",)] == pytest.approx(39 - 2)
    lines = "\n".join(forecast_lines(one, FOUR))
    assert "the iteration waits most for: policy" in lines
    assert "the next core to policy: policy.processes=2, " in lines
    ahead = found(config_of(*cpu, "ppo.max_staleness=1"), speeds("CPU"), cores=2)
    # No core works on two things: the engine's (10 + 2), scorers' 8 + 4 + 4, trainers' 20 + 16 s; on two cores.
    assert ahead.estimate.bounds_s["cores"] == pytest.approx((12 + 16 + 36) / 2)
    assert (ahead.estimate.iteration_s, ahead.estimate.limiting) == (pytest.approx(32), "cores")


def test_processes_that_are_bound_to_cores():
    cpu = [f"{name}.gpus=0" for name in ("policy", "critic", "reference", "reward", "rollout")]
    cpu += ["rollout.kv_cache_gib=1"]
    bound = "placement.cores={" + ", ".join(f"{name}: [1]" for name in ("policy", "critic", "reference", "reward"))
    one = found(config_of(*cpu, bound + ", rollout: [0]}", "ppo.max_staleness=1"), speeds("CPU"), cores=2)
    # Core 0 has the engine's 10 + 2 s, core 1 all else: 8 + 4 + 4 s of scoring, 20 + 16 s of training.
    assert one.estimate.bounds_s["core 0"] == pytest.approx(12)
    assert one.estimate.bounds_s["core 1"] == pytest.approx(52)
    assert one.estimate.bounds_s["training"] == pytest.approx(4 + 36 + 3)
    assert (one.estimate.iteration_s, one.estimate.limiting) == (pytest.approx(52), "core 1")


def test_a_thousand_gpus_are_estimated_on_a_laptop():
    large = config_of("policy.processes=512", "critic.processes=128", "reference.processes=64", "reward.processes=64")
    large = large.model_copy(update={"rollout": large.rollout.model_copy(update={"engines": 256})})
    prompts = 4096
    samples = Samples([10] * prompts, [10 + index % 7 for index in range(prompts)])
    one = found(large, speeds(samples=samples), samples)
    assert sum(group.processes * group.units for group in one.groups.values()) == 1024
    # 16 responses an engine, at 4 s a step up to the shortest, and fewer at a time after it.
    assert 10 * 4 + 16 * 0.5 < one.estimate.parts_s["sampling"] < 16 * 4 + 16 * 0.5
    tokens = sum(map(sum, samples.sequences))
    assert one.estimate.busy_s["policy"] == pytest.approx(tokens * 0.25 / 512, rel=0.05)


def test_a_model_of_unknown_size_is_an_error():
    with pytest.raises(ModelError, match=r"policy\.path: the size of model is not known here"):
        throughput(config_of(), Layout([], {}), [], FOUR, speeds(), lambda _: None)


def test_speeds_of_a_run_are_those_of_processes_alone():
    timeline = {
        "policy-0": [Span("step", 0.0, 4.0, {})],
        "critic-0": [Span("step", 0.0, 2.0, {}), Span("forward", 4.0, 5.0, {})],
        "driver": [Span("train", 0.0, 5.0, {})],
    }
    places = Places({"cores": 1.0}, {"policy-0": {"cores": 1.0}, "critic-0": {"cores": 1.0}})
    # Both at half speed for two seconds.
    assert alone_seconds(timeline, places) == {
        ("policy", "step"): 3.0,
        ("critic", "step"): 1.0,
        ("critic", "forward"): 1.0,
    }


def test_rows_of_bench_rollout_are_steps(tmp_path: Path):
    sizes = {
        "hidden_size": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 1,
        "vocab_size": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"tie_word_embeddings": True}))
    config = config_of(f"policy.path={tmp_path}", "rollout.tensor_parallel=2")
    row = {"engines": 2, "tensor_parallel": 2, "max_concurrency": 16, "requests": 64, "response_tokens": "128"}
    row["generated_tokens_per_s"] = {"median": 800.0}
    other = row | {"response_tokens": "lognormal 48, 0.9, at most 384"}
    (cell,) = rollout_cells(config, [row, other])
    # 400 tokens/s an engine, 16 at a time: 40 ms a step, on two GPUs.
    assert (cell.work, cell.at_once, cell.device) == ("sample", 16, "GPU")
    assert cell.seconds == pytest.approx(0.08)
