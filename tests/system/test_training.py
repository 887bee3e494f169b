"""The DeepSpeed trainer: one gradient whatever the ranks, micro-batches and ZeRO stage, and what the options change."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trainer_ranks import Ranks

from rlhf_ray.errors import EngineError
from rlhf_ray.models.reading import SequenceScores, StateValues, TokenLogprobs, body_inputs
from rlhf_ray.packing import Sequence, partition
from rlhf_ray.training.objectives import (
    DirectPreference,
    LanguageModeling,
    PolicyUpdate,
    PreferenceReward,
    ValueUpdate,
)

pytestmark = pytest.mark.system

VOCAB = 320
LONGEST = 24
# With an epsilon far above every gradient, AdamW's update is linear in the gradient instead of its sign: what
# differs in a gradient then differs as much in the weights.
LINEAR = {"eps": 1e3, "learning_rate": 1e3}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def sequences(count: int, seed: int = 0, token_fields: tuple[str, ...] = (), **fields: Callable[[int], float]):
    """Random sequences of 4 to `LONGEST` tokens, the last half of each being targets."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(4, LONGEST + 1, (1,), generator=generator))
        mask = torch.arange(length) >= max(1, length // 2)
        made.append(
            Sequence(
                torch.randint(5, VOCAB, (length,), generator=generator),
                mask,
                {name: torch.randn(length, generator=generator) * mask for name in token_fields},
                {name: value(index) for name, value in fields.items()},
            )
        )
    return made


def responses(count: int) -> list[Sequence]:
    """Responses with the fields of a policy update, one in three a demonstration instead."""
    made = sequences(
        count, 3, ("advantages", "old_logprobs", "ref_logprobs", "engine_logprobs"), ptx=lambda i: i % 3 == 2
    )
    for sequence in made:
        for name in ("old_logprobs", "ref_logprobs", "engine_logprobs"):
            sequence.token_fields[name] = (sequence.token_fields[name] * 0.3 - math.log(VOCAB)) * sequence.loss_mask
    return made


# Objective, head of the model, sequences, and how many of them stay together.
CASES: dict[str, tuple[Any, str, list[Sequence], int]] = {
    "sft": (LanguageModeling(), "causal", sequences(10), 1),
    "reward": (
        PreferenceReward(label_smoothing=0.1, centering_coef=0.05, margin=True),
        "scalar",
        sequences(10, 1, weight=lambda i: 1.0 / (1 + i // 2), margin=lambda i: 0.1 * (i // 2)),
        2,
    ),
    "dpo": (
        DirectPreference(0.5, label_smoothing=0.1),
        "causal",
        sequences(10, 2, weight=lambda i: 1.0 / (1 + i // 2), ref_logprob=lambda i: -20.0 - i),
        2,
    ),
    "ipo": (
        DirectPreference(0.5, "ipo"),
        "causal",
        sequences(10, 2, weight=lambda i: 1.0 / (1 + i // 2), ref_logprob=lambda i: -20.0 - i),
        2,
    ),
    "policy": (
        PolicyUpdate(0.2, 0.7, False, entropy_coef=0.1, kl_coef=0.2, kl_estimator="k3", ptx_coef=0.5),
        "causal",
        responses(10),
        1,
    ),
    "on-policy": (PolicyUpdate(0.2, 0.7, True, entropy_coef=0.1), "causal", responses(10), 1),
    "value": (ValueUpdate(0.2), "scalar", sequences(10, 4, ("old_values", "returns")), 1),
}


def train(ranks: Any, spec: Any, case: str, steps: int = 2) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics of each optimizer step on the case's one batch, and the weights after the last."""
    objective, _, batch, together = CASES[case]
    group = ranks.build(spec)
    ids = [index // together for index in range(len(batch))]
    metrics = [group.step(batch, objective, ids).result() for _ in range(steps)]
    return metrics, ranks.weights()


def assert_same(found, expected, **tolerance: float) -> None:
    """Metrics of every step, then weights."""
    tolerance = tolerance or TOLERANCE
    for a, b in zip(found[0], expected[0], strict=True):
        assert a.keys() == b.keys()
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=tolerance["rtol"], abs=tolerance["atol"]), name
    torch.testing.assert_close(found[1], expected[1], **tolerance)


@pytest.fixture(scope="module")
def expected(ranks, make_spec):
    """What one rank computes in one micro-batch, by case."""
    done = {}

    def get(case: str):
        if case not in done:
            done[case] = train(ranks(1), make_spec(CASES[case][1], **LINEAR), case)
        return done[case]

    return get


def start_weights(folder: str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(1, 0), (2, 3), (4, 2)], ids=["1 rank", "2 ranks", "4 ranks"])
def test_loss_gradient_and_update_do_not_depend_on_ranks_or_micro_batches(
    ranks, make_spec, expected, case, num_ranks, zero_stage
):
    _, head, batch, together = CASES[case]
    budget = LONGEST * together
    plan = partition([len(s) for s in batch], num_ranks, budget, [i // together for i in range(len(batch))])
    assert len(plan[0]) > 1
    spec = make_spec(head, zero_stage=zero_stage, micro_batch_tokens=budget, **LINEAR)
    assert_same(train(ranks(num_ranks), spec, case), expected(case))


def test_ranks_without_work_change_nothing(ranks, make_spec):
    """One pair on four ranks: three of them run empty micro-batches only."""
    for case in ("reward", "dpo", "policy", "value", "sft"):
        objective, head, batch, _ = CASES[case]
        found = []
        for num_ranks, zero_stage in ((1, 1), (4, 3)):
            group = ranks(num_ranks).build(make_spec(head, zero_stage=zero_stage, **LINEAR))
            found.append(([group.step(batch[:2], objective, [0, 0]).result()], ranks(num_ranks).weights()))
        assert_same(found[1], found[0])


@pytest.fixture(scope="module")
def by_stage(ranks, make_spec):
    """Metrics and weights after two steps on two ranks, by case and ZeRO stage."""
    done = {}

    def get(case: str, zero_stage: int):
        key = case, zero_stage
        if key not in done:
            done[key] = train(ranks(2), make_spec(CASES[case][1], zero_stage=zero_stage, **LINEAR), case)
        return done[key]

    return get


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("case", ["sft", "value"])
def test_every_parameter_changes_at_each_zero_stage(by_stage, models, case, zero_stage):
    start = start_weights(models[CASES[case][1]])
    _, weights = by_stage(case, zero_stage)
    assert weights.keys() == start.keys()
    assert len(weights) == 20 + (case == "value")
    unchanged = [name for name, weight in weights.items() if torch.equal(weight, start[name])]
    assert unchanged == []


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("case", ["sft", "value"])
def test_zero_stages_agree(by_stage, case, zero_stage):
    assert_same(by_stage(case, zero_stage), by_stage(case, 0))


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_learning_rate_zero_changes_nothing(ranks, make_spec, models, zero_stage):
    spec = make_spec(learning_rate=0.0, zero_stage=zero_stage, weight_decay=0.1)
    metrics, weights = train(ranks(2), spec, "sft")
    assert metrics[0] == metrics[1]
    start = start_weights(models["causal"])
    assert all(torch.equal(weights[name], start[name]) for name in start)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_trains_at_each_zero_stage(ranks, make_spec, expected, zero_stage):
    spec = make_spec(zero_stage=zero_stage, dtype="bf16", learning_rate=3e-3)
    metrics, weights = train(ranks(2), spec, "sft", steps=4)
    assert metrics[0]["loss"] == pytest.approx(expected("sft")[0][0]["loss"], rel=0.01)
    assert metrics[0]["grad_norm"] == pytest.approx(expected("sft")[0][0]["grad_norm"], rel=0.03)
    assert metrics[3]["loss"] < metrics[0]["loss"] - 0.1
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("sft", {"offload_optimizer": True, "zero_stage": 1}),
        ("sft", {"offload_optimizer": True, "zero_stage": 2}),
        ("sft", {"offload_optimizer": True, "zero_stage": 3}),
        ("policy", {"gradient_checkpointing": True, "zero_stage": 1}),
        ("policy", {"gradient_checkpointing": True, "zero_stage": 3, "micro_batch_tokens": 50}),
        ("value", {"gradient_checkpointing": True, "zero_stage": 3, "micro_batch_tokens": 50}),
        ("policy", {"compile": True, "gradient_checkpointing": True, "zero_stage": 2, "micro_batch_tokens": 50}),
        ("value", {"compile": True, "zero_stage": 1}),
    ],
    ids=[
        *("offload-1", "offload-2", "offload-3", "checkpointing-1", "checkpointing-3", "checkpointing-critic"),
        *("compiled-checkpointing", "compiled-critic"),
    ],
)
def test_options_that_save_memory_or_time_change_no_number(ranks, make_spec, expected, case, options):
    assert_same(train(ranks(2), make_spec(CASES[case][1], **options, **LINEAR), case), expected(case))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_an_optimizer_that_made_room_for_others_goes_on_as_if_it_had_not(ranks, make_spec, tmp_path, zero_stage):
    objective, _, batch, _ = CASES["sft"]
    spec = make_spec(zero_stage=zero_stage)
    expected = train(ranks(2), spec, "sft", steps=3)
    group = ranks(2).build(spec)
    metrics = []
    for _ in range(3):
        group.restore_optimizer().result()
        metrics.append(group.step(batch, objective).result())
        group.free_optimizer().result()
        group.forward(batch, TokenLogprobs()).result()
    assert_same((metrics, ranks(2).weights()), expected, rtol=0.0, atol=0.0)
    # What is saved meanwhile is whole.
    group.save(str(tmp_path)).result()
    again = ranks(2).build(spec)
    again.load(str(tmp_path)).result()
    assert again.step(batch, objective).result() == train(ranks(2), spec, "sft", steps=4)[0][-1]


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_gradients_above_the_limit_are_scaled_down_and_their_norm_is_reported_unscaled(
    ranks, make_spec, models, zero_stage
):
    start = start_weights(models["causal"])["model.norm.weight"]

    def updated(limit: float) -> tuple[float, Tensor]:
        # An epsilon so large that the gradient beside it is lost: the update is the gradient times 1.
        spec = make_spec(zero_stage=zero_stage, max_grad_norm=limit, eps=1e5, learning_rate=1e5)
        metrics, weights = train(ranks(2), spec, "sft", steps=1)
        return metrics[0]["grad_norm"], weights["model.norm.weight"] - start

    free_norm, free = updated(1e9)
    clipped_norm, clipped = updated(0.5)
    assert clipped_norm == pytest.approx(free_norm, rel=1e-5)
    assert free_norm > 2.0
    torch.testing.assert_close(clipped, free * 0.5 / free_norm, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.03, 0.06, 0.09, 0.09, 0.09, 0.09]),
        ("linear", [0.03, 0.06, 0.09, 0.0675, 0.045, 0.0225]),
        ("cosine", [0.03, 0.06, 0.09, 0.07681980515339464, 0.045, 0.013180194846605365]),
    ],
)
def test_learning_rates_follow_warm_up_and_schedule(ranks, make_spec, schedule, rates):
    spec = make_spec(learning_rate=0.09, schedule=schedule, warmup_steps=2, total_steps=6)
    group = ranks(1).build(spec)
    batch = CASES["sft"][2][:1]
    found = [group.step(batch, LanguageModeling()).result()["learning_rate"] for _ in rates]
    assert found == pytest.approx(rates, rel=1e-12)


def test_learning_rate_that_is_reported_is_the_one_that_was_used(ranks, make_spec, models):
    """Plain AdamW's first update is the learning rate, whatever the gradient."""
    spec = make_spec(learning_rate=0.09, warmup_steps=2, zero_stage=2)
    metrics, weights = train(ranks(2), spec, "sft", steps=1)
    update = weights["model.norm.weight"] - start_weights(models["causal"])["model.norm.weight"]
    assert metrics[0]["learning_rate"] == pytest.approx(0.03)
    torch.testing.assert_close(update.abs(), torch.full((64,), 0.03), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("head", "reader"),
    [("causal", TokenLogprobs(0.7)), ("scalar", StateValues()), ("scalar", SequenceScores())],
    ids=["log-probabilities", "values", "scores"],
)
def test_forward_returns_each_sequence_in_its_place(ranks, make_spec, head, reader):
    batch = sequences(9, seed=6)
    alone = ranks(1).build(make_spec(head)).forward(batch, reader).result()
    spread = ranks(4).build(make_spec(head, zero_stage=3, micro_batch_tokens=50)).forward(batch, reader).result()
    assert [len(one) for one in spread] == [len(one) for one in alone]
    for a, b in zip(spread, alone, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_evaluation_trains_nothing_and_drops_nothing_out(ranks, make_spec):
    objective, head, batch, _ = CASES["reward"]
    pairs = [index // 2 for index in range(len(batch))]
    group = ranks(2).build(make_spec(head, dropout=0.5))
    before = ranks(2).weights()
    first, second = (group.evaluate(batch, objective, pairs).result() for _ in range(2))
    assert first == second
    after = ranks(2).weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    without = ranks(1).build(make_spec(head)).step(batch, objective, pairs).result()
    assert first["loss"] == pytest.approx(without["loss"], rel=1e-5)
    assert abs(group.step(batch, objective, pairs).result()["loss"] - without["loss"]) > 1e-3


def odd_objective(*, broken: bool) -> Any:
    """A loss of zero whose gradient is infinite times zero; or one that rank 0 cannot compute."""

    class Odd:  # within a function, so that it travels by value: ranks cannot import this module
        def counts(self, batch: Any) -> dict[str, float]:
            return {"tokens": batch.num_targets}

        def loss(self, model: Any, batch: Any, totals: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
            if broken and torch.distributed.get_rank() == 0:
                raise EngineError("it is broken")
            logprobs, _ = model(**body_inputs(batch), target_index=batch.target_index)
            return (logprobs.sum() * 0.0).sqrt(), {}

    return Odd()


@pytest.mark.parametrize("broken", ["loss", "gradient"])
@pytest.mark.parametrize(
    "options",
    [
        {"zero_stage": 0},
        {"zero_stage": 1},
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 3},
        {"zero_stage": 3, "offload_optimizer": True},
        {"zero_stage": 0, "dtype": "bf16"},
        {"zero_stage": 2, "dtype": "bf16"},
    ],
    ids=lambda value: "-".join(map(str, value.values())),
)
def test_an_update_that_is_not_finite_is_skipped_by_all_ranks(ranks, make_spec, options, broken):
    """One number of one sequence, on one of two ranks; or a gradient on both. It is as if it had not been there."""
    objective, bad = CASES["on-policy"][0], responses(4)
    bad[0].token_fields["advantages"][-1] = math.nan
    spec = make_spec(**options, schedule="linear", learning_rate=1e-3)

    def steps(*, with_bad: bool) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        group = ranks(2).build(spec)
        metrics = [group.step(responses(4), objective).result()]
        if with_bad:
            before = ranks(2).weights()
            step = (bad, objective) if broken == "loss" else (responses(4), odd_objective(broken=False))
            found = group.step(*step).result()
            assert (found["skipped_updates"], found["unchanged_updates"]) == (1.0, 0.0)
            assert math.isfinite(found["loss"]) == (broken == "gradient")
            assert not math.isfinite(found["grad_norm"])
            after = ranks(2).weights()
            assert all(torch.equal(after[name], before[name]) for name in before)
        metrics.append(group.step(responses(4), objective).result())
        return metrics, ranks(2).weights()

    metrics, weights = steps(with_bad=True)
    expected_metrics, expected = steps(with_bad=False)
    assert metrics == expected_metrics
    assert [one["unchanged_updates"] for one in metrics] == [0.0, 0.0]
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_updates_that_change_nothing_are_counted(ranks, make_spec, zero_stage):
    group = ranks(2).build(make_spec(zero_stage=zero_stage, learning_rate=1e-60))  # zero in fp32
    found = [group.step(CASES["sft"][2], LanguageModeling()).result() for _ in range(3)]
    assert [one["unchanged_updates"] for one in found] == [1.0, 2.0, 3.0]
    assert [one["skipped_updates"] for one in found] == [0.0, 0.0, 0.0]


def test_an_error_of_one_rank_ends_the_step(ray_cluster, make_spec, tmp_path):
    """The other waits for it in a collective and must not keep the driver."""
    with ExitStack() as stack:
        own = Ranks(make_spec(), 2, tmp_path, stack)
        started = time.monotonic()
        with pytest.raises(EngineError, match="it is broken"):
            own.group.step(responses(4), odd_objective(broken=True)).result()
        assert time.monotonic() - started < 20


def test_group_larger_than_a_micro_batch_is_refused_before_anything_runs(ranks, make_spec):
    group = ranks(1).build(make_spec(micro_batch_tokens=16))
    with pytest.raises(ValueError, match="more than the token budget of 16"):
        group.step(sequences(10), LanguageModeling())
