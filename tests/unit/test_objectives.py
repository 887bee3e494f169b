"""Objectives on tiny real models: what they compute, and that shares of micro-batches add up to the whole."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import make_llama

from rlhf_ray.config.sections import TrainingSection
from rlhf_ray.errors import EngineError
from rlhf_ray.models.loading import load_causal_lm, load_scalar
from rlhf_ray.models.reading import SequenceScores, StateValues, TokenLogprobs
from rlhf_ray.packing import Sequence, pack
from rlhf_ray.training.deepspeed_config import lr_multiplier
from rlhf_ray.training.objectives import (
    DirectPreference,
    LanguageModeling,
    PolicyUpdate,
    PreferenceReward,
    ValueUpdate,
)

VOCAB = 320


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return load_causal_lm(make_llama(tmp_path_factory.mktemp("causal")), "fp32")


@pytest.fixture(scope="module")
def scalar(tmp_path_factory):
    return load_scalar(make_llama(tmp_path_factory.mktemp("scalar"), scalar=True), "fp32")


def sequence(length: int, num_targets: int, seed: int, token_fields=None, **fields) -> Sequence:
    ids = torch.randint(5, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(length) >= length - num_targets
    full = {name: torch.zeros(length).masked_scatter(mask, torch.tensor(v)) for name, v in (token_fields or {}).items()}
    return Sequence(ids, mask, full, fields)


def totals_of(objective, batches):
    counts = [objective.counts(batch) for batch in batches]
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def gradients(model, objective, sequences, split):
    """Loss, metrics and gradients of the micro-batches that `split` makes; metrics of several are added."""
    batches = [pack(sequences, indices) for indices in split]
    totals = totals_of(objective, batches)
    model.zero_grad()
    loss, metrics = 0.0, {}
    for batch in batches:
        share, shares = objective.loss(model, batch, totals)
        share.backward()
        loss += float(share.detach())
        for name, value in shares.items():
            metrics.setdefault(name, []).append(float(value))
    merged = {n: max(v) if n.endswith("/max") else min(v) if n.endswith("/min") else sum(v) for n, v in metrics.items()}
    return loss, merged, {name: p.grad.clone() for name, p in model.transformers_parameters()}


RESPONSE = ("advantages", "old_logprobs", "ref_logprobs", "engine_logprobs")


def response(length: int, num_targets: int, seed: int, ptx: float = 0.0) -> Sequence:
    generator = torch.Generator().manual_seed(100 + seed)
    fields = {"advantages": torch.randn(num_targets, generator=generator).tolist()}
    for name in RESPONSE[1:]:
        fields[name] = (-5.5 + 0.4 * torch.randn(num_targets, generator=generator)).tolist()
    return sequence(length, num_targets, seed, fields, ptx=ptx)


CASES = {
    "sft": (LanguageModeling(), "causal", [sequence(4 + i, 2 + i, i) for i in range(6)], [[0, 1], [2, 3, 4], [5]]),
    "reward": (
        PreferenceReward(0.1, 0.05, margin=True),
        "scalar",
        [sequence(4 + i, 2, i, weight=(1.0, 0.5, 0.25)[i // 2], margin=0.3 * (i // 2)) for i in range(6)],
        [[0, 1], [2, 3, 4, 5]],
    ),
    "dpo": (
        DirectPreference(0.3, label_smoothing=0.1),
        "causal",
        [
            sequence(4 + i, 1 + i // 2, i, ref_logprob=-6.0 * (1 + i // 2), weight=(1.0, 0.5, 0.25)[i // 2])
            for i in range(6)
        ],
        [[0, 1, 2, 3], [4, 5]],
    ),
    "ipo": (
        DirectPreference(0.3, "ipo"),
        "causal",
        [
            sequence(4 + i, 1 + i // 2, i, ref_logprob=-6.0 * (1 + i // 2), weight=(1.0, 0.5, 0.25)[i // 2])
            for i in range(6)
        ],
        [[0, 1, 2, 3], [4, 5]],
    ),
    "policy": (
        PolicyUpdate(0.2, 0.7, False, entropy_coef=0.1, kl_coef=0.2, kl_estimator="k2", ptx_coef=0.5),
        "causal",
        [response(5 + i, 2 + i, i, ptx=float(i == 4)) for i in range(6)],
        [[0, 4, 1], [2, 3], [5]],
    ),
    "on-policy": (
        PolicyUpdate(0.2, 0.7, True, entropy_coef=0.1),
        "causal",
        [response(5 + i, 2 + i, i) for i in range(6)],
        [[0, 4, 1], [2, 3], [5]],
    ),
    "stale": (
        PolicyUpdate(0.2, 0.7, False, importance_cap=1.2),
        "causal",
        [response(5 + i, 2 + i, i) for i in range(6)],
        [[0, 4, 1], [2, 3], [5]],
    ),
    "value": (
        ValueUpdate(0.2),
        "scalar",
        [sequence(5 + i, 2, i, {"old_values": [0.1, 0.2], "returns": [0.5, -0.5 * i]}) for i in range(6)],
        [[5, 0], [1, 2, 3], [4]],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_shares_of_micro_batches_add_up_to_the_loss_metrics_and_gradient_of_the_whole(request, case):
    objective, head, sequences, split = CASES[case]
    model = request.getfixturevalue(head)
    whole = gradients(model, objective, sequences, [range(6)])
    # An empty micro-batch, such as a rank without work has, adds nothing.
    parts = gradients(model, objective, sequences, [*split, []])
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert parts[1] == pytest.approx(whole[1], rel=1e-4, abs=1e-6)
    assert sum(float(gradient.norm()) for gradient in whole[2].values()) > 0.1
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_empty_batch_gives_every_parameter_a_gradient_of_zero(request, case):
    objective, head, sequences, _ = CASES[case]
    model = request.getfixturevalue(head)
    empty = pack(sequences, [])
    assert set(objective.counts(empty).values()) == {0}
    model.zero_grad()
    loss, metrics = objective.loss(model, empty, totals_of(objective, [pack(sequences, range(6))]))
    loss.backward()
    assert float(loss) == 0.0
    assert metrics == {}
    assert all(p.grad is not None and not p.grad.any() for _, p in model.transformers_parameters())


def test_sft_loss_is_the_mean_over_target_tokens_and_not_over_sequences(causal):
    sequences = [sequence(8, 1, 0), sequence(8, 7, 1)]
    batch = pack(sequences, [0, 1])
    logprobs = TokenLogprobs()(causal, batch)
    loss, _ = LanguageModeling().loss(causal, batch, {"tokens": 8})
    assert float(loss) == pytest.approx(-float(logprobs[0].sum() + logprobs[1].sum()) / 8, rel=1e-6)


def test_reward_is_read_at_the_last_token_and_pairs_count_by_weight(scalar):
    sequences = [sequence(4 + i, 2, i, weight=(1.0, 1.0, 3.0, 3.0)[i], margin=7.0) for i in range(4)]
    batch = pack(sequences, range(4))
    ends = torch.tensor([3, 8, 14, 21])
    assert batch.last_index.tolist() == ends.tolist()
    scores = scalar(batch.input_ids, batch.position_ids, batch.cu_seqlens, ends).detach()
    objective = PreferenceReward()
    assert objective.counts(batch) == {"pairs": 4.0}
    loss, metrics = objective.loss(scalar, batch, {"pairs": 4.0})
    a, b = (scores[0] - scores[1]).item(), (scores[2] - scores[3]).item()
    assert float(loss) == pytest.approx((math.log1p(math.exp(-a)) + 3 * math.log1p(math.exp(-b))) / 4, rel=1e-5)
    assert float(metrics["margin"]) == pytest.approx((a + 3 * b) / 4, rel=1e-4)
    assert float(metrics["accuracy"]) == pytest.approx(((a > 0) + 3 * (b > 0)) / 4)
    # The margin column counts where it is asked for.
    with_margin, _ = PreferenceReward(margin=True).loss(scalar, batch, {"pairs": 4.0})
    expected = (math.log1p(math.exp(7 - a)) + 3 * math.log1p(math.exp(7 - b))) / 4
    assert float(with_margin) == pytest.approx(expected, rel=1e-5)


def test_dpo_starts_at_log_two_where_policy_and_reference_are_one(causal):
    plain = [sequence(6 + i, 2 + i, i, ref_logprob=0.0, weight=1.0) for i in range(4)]
    sums = [float(one.sum()) for one in TokenLogprobs()(causal, pack(plain, range(4)))]
    pairs = [replace(one, fields={"ref_logprob": total, "weight": 1.0}) for one, total in zip(plain, sums, strict=True)]
    loss, metrics = DirectPreference(0.1).loss(causal, pack(pairs, range(4)), {"pairs": 2})
    assert float(loss) == pytest.approx(math.log(2), abs=1e-5)
    assert float(metrics["rewards/margins"]) == pytest.approx(0.0, abs=1e-5)
    assert float(metrics["logps/chosen"]) == pytest.approx((sums[0] + sums[2]) / 2, rel=1e-5)
    loss, _ = DirectPreference(0.1, "ipo").loss(causal, pack(pairs, range(4)), {"pairs": 2})
    assert float(loss) == pytest.approx(25.0, rel=1e-4)  # (1 / (2 * 0.1))**2


def test_dpo_sums_and_ipo_averages_the_reply(causal):
    """Rejected replies are twice as long; the reference gives each of their tokens -1 and each chosen token -3."""
    pair = [sequence(5, 2, 0, ref_logprob=-6.0, weight=1.0), sequence(9, 4, 1, ref_logprob=-4.0, weight=1.0)]
    batch = pack(pair, [0, 1])
    chosen, rejected = (one.sum().item() for one in TokenLogprobs()(causal, batch))
    h = (chosen + 6.0) - (rejected + 4.0)
    loss, _ = DirectPreference(0.2).loss(causal, batch, {"pairs": 1})
    assert float(loss) == pytest.approx(math.log1p(math.exp(-0.2 * h)), rel=1e-4)
    h = (chosen + 6.0) / 2 - (rejected + 4.0) / 4
    loss, _ = DirectPreference(0.2, "ipo").loss(causal, batch, {"pairs": 1})
    assert float(loss) == pytest.approx((h - 2.5) ** 2, rel=1e-4)


def test_dpo_pairs_count_by_weight(causal):
    """Two pairs of one ranking of weight 1/2 each, beside a pair of weight 1: the mean over two comparisons."""
    weights = (0.5, 0.5, 1.0)
    pairs = [sequence(6 + i, 2 + i, i, ref_logprob=-10.0, weight=weights[i // 2]) for i in range(6)]
    batch = pack(pairs, range(6))
    objective = DirectPreference(0.2)
    assert objective.counts(batch) == {"pairs": 2.0}
    loss, metrics = objective.loss(causal, batch, {"pairs": 2.0})
    sums = [float(one.sum()) for one in TokenLogprobs()(causal, batch)]
    differences = [chosen - rejected for chosen, rejected in zip(sums[::2], sums[1::2], strict=True)]
    losses = [math.log1p(math.exp(-0.2 * h)) for h in differences]
    assert float(loss) == pytest.approx((0.5 * losses[0] + 0.5 * losses[1] + losses[2]) / 2, rel=1e-4)
    expected = 0.2 * (0.5 * differences[0] + 0.5 * differences[1] + differences[2]) / 2
    assert float(metrics["rewards/margins"]) == pytest.approx(expected, rel=1e-4)


def test_on_policy_ratio_is_one_and_the_loss_is_minus_the_mean_advantage(causal):
    sequences = [response(7, 3, 0), response(9, 5, 1)]
    batch = pack(sequences, [0, 1])
    loss, metrics = PolicyUpdate(0.2, 0.7, one_step=True).loss(causal, batch, {"tokens": 8, "ptx_tokens": 0})
    assert float(loss) == pytest.approx(-float(batch.targets("advantages").mean()), rel=1e-5)
    assert float(metrics["val/ratio"]) == pytest.approx(1.0, abs=1e-6)
    assert float(metrics["policy/clipfrac_avg"]) == 0.0
    assert float(metrics["policy/approxkl_avg"]) == 0.0


def test_policy_terms_add_up_with_their_coefficients_and_temperatures(causal):
    sequences = [response(7, 3, 0), response(9, 5, 1), response(8, 4, 2, ptx=1.0)]
    batch = pack(sequences, [0, 1, 2])
    objective = PolicyUpdate(0.2, 0.5, False, entropy_coef=0.1, kl_coef=0.2, kl_estimator="k3", ptx_coef=0.5)
    assert objective.counts(batch) == {"tokens": 8, "ptx_tokens": 4}
    loss, metrics = objective.loss(causal, batch, {"tokens": 8.0, "ptx_tokens": 4.0})

    sampled = torch.cat(TokenLogprobs(0.5)(causal, batch)[:2]).detach()
    demonstration = TokenLogprobs(1.0)(causal, batch)[2].detach()
    old, reference, advantages = (
        torch.cat([s.token_fields[name][s.loss_mask] for s in sequences[:2]])
        for name in ("old_logprobs", "ref_logprobs", "advantages")
    )
    _, entropy = causal(
        batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.target_index, temperature=0.5, with_entropy=True
    )
    ratio = (sampled - old).exp()
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    difference = reference - sampled
    kl = (difference.exp() - 1 - difference).mean()
    expected = surrogate - 0.1 * entropy[:8].mean() + 0.2 * kl - 0.5 * demonstration.mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics["loss/policy_avg"]) == pytest.approx(float(surrogate), rel=1e-5)
    assert float(metrics["policy/entropy_avg"]) == pytest.approx(float(entropy[:8].mean()), rel=1e-5)
    assert float(metrics["loss/kl_avg"]) == pytest.approx(float(kl), rel=1e-4)
    assert float(metrics["loss/ptx_avg"]) == pytest.approx(-float(demonstration.mean()), rel=1e-5)
    assert float(metrics["val/ratio"]) == pytest.approx(float(ratio.mean()), rel=1e-5)
    assert "sampling/kl" not in metrics


@pytest.mark.parametrize("one_step", [True, False])
def test_stale_tokens_are_weighed_by_the_proximal_over_the_sampling_policy(causal, one_step):
    sequences = [response(7, 3, 0), response(9, 5, 1), response(8, 4, 2, ptx=1.0)]
    batch = pack(sequences, [0, 1, 2])
    own = torch.cat(TokenLogprobs(0.7)(causal, batch)[:2]).detach()
    proximal = own if one_step else torch.cat([s.token_fields["old_logprobs"][s.loss_mask] for s in sequences[:2]])
    # The first response's tokens were sampled half as likely, within the cap; the second's four times: masked.
    engine = proximal - torch.log(torch.tensor([2.0] * 3 + [0.25] * 5))
    for one, part in zip(sequences, engine.split([3, 5]), strict=False):
        one.token_fields["engine_logprobs"][one.loss_mask] = part
    batch = pack(sequences, [0, 1, 2])
    objective = PolicyUpdate(0.2, 0.7, one_step, importance_cap=3.0)
    loss, metrics = objective.loss(causal, batch, {"tokens": 8.0, "ptx_tokens": 4.0})
    advantages = torch.cat([s.token_fields["advantages"][s.loss_mask] for s in sequences[:2]])
    ratio = (own - proximal).exp()
    terms = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    assert float(loss) == pytest.approx(float(-2.0 * terms[:3].sum() / 8), rel=1e-4)
    found = {name: float(metrics[f"sampling/importance_weight/{name}"]) for name in ("mean", "truncated", "masked")}
    assert found == pytest.approx({"mean": 6 / 8, "truncated": 0.0, "masked": 5 / 8}, rel=1e-5)


def test_batch_of_demonstrations_alone_has_the_ptx_term_alone(causal):
    batch = pack([response(8, 4, 2, ptx=1.0)], [0])
    objective = PolicyUpdate(0.2, 0.5, True, entropy_coef=0.1, ptx_coef=0.5)
    loss, metrics = objective.loss(causal, batch, {"tokens": 8.0, "ptx_tokens": 4.0})
    assert metrics.keys() == {"loss/ptx_avg"}
    assert float(loss) == pytest.approx(-0.5 * float(TokenLogprobs()(causal, batch)[0].mean()), rel=1e-5)


def test_engine_mismatch_is_measured_against_the_sampled_policy(causal):
    plain = response(7, 3, 0)
    own = TokenLogprobs(0.7)(causal, pack([plain], [0]))[0].detach()
    plain.token_fields["engine_logprobs"][plain.loss_mask] = own - torch.tensor([0.0, 0.1, -0.3])
    _, metrics = PolicyUpdate(0.2, 0.7, True).loss(causal, pack([plain], [0]), {"tokens": 3.0, "ptx_tokens": 0.0})
    found = {name.removeprefix("sampling/"): float(v) for name, v in metrics.items() if name.startswith("sampling/")}
    e1, e3 = math.exp(0.1), math.exp(-0.3)
    assert found == pytest.approx(
        {
            "sampling_logp_difference/mean": 0.4 / 3,
            "sampling_logp_difference/max": 0.3,
            "importance_sampling_ratio/mean": (1 + e1 + e3) / 3,
            "importance_sampling_ratio/min": e3,
            "importance_sampling_ratio/max": e1,
            "kl": (e1 - 1 - 0.1 + e3 - 1 + 0.3) / 3,
        },
        abs=1e-5,
    )


def test_value_of_a_token_is_read_in_the_state_before_it(scalar):
    one = sequence(6, 2, 0, {"old_values": [0.0, 0.0], "returns": [1.0, 2.0]})
    batch = pack([one], [0])
    states = scalar(batch.input_ids, batch.position_ids, batch.cu_seqlens, torch.tensor([3, 4, 5])).detach()
    torch.testing.assert_close(StateValues()(scalar, batch)[0], states)
    torch.testing.assert_close(SequenceScores()(scalar, batch)[0], states[2:])
    loss, metrics = ValueUpdate(math.inf).loss(scalar, batch, {"tokens": 2.0})
    expected = 0.5 * ((states[0] - 1) ** 2 + (states[1] - 2) ** 2) / 2
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics["val/clipfrac_avg"]) == 0.0
    # Held within 0.01 of zero, values cannot come near the returns, and what they lack has no gradient.
    clipped, metrics = ValueUpdate(0.01).loss(scalar, batch, {"tokens": 2.0})
    bound = states[:2].clamp(-0.01, 0.01)
    terms = torch.maximum((states[:2] - torch.tensor([1.0, 2.0])) ** 2, (bound - torch.tensor([1.0, 2.0])) ** 2)
    assert float(clipped) == pytest.approx(float(0.5 * terms.sum() / 2), rel=1e-5)


def test_numbers_that_are_not_finite_are_refused(causal):
    one = response(7, 3, 0)
    one.token_fields["advantages"][-1] = math.inf
    with pytest.raises(EngineError, match="advantages must be finite, found 1 of 3"):
        PolicyUpdate(0.2, 0.7, True).loss(causal, pack([one], [0]), {"tokens": 3.0, "ptx_tokens": 0.0})


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.25, 0.5, 0.75, 1, 0.8535533905932737, 0.5, 0.14644660940672624, 0]),
    ],
)
def test_learning_rate_warms_up_and_ends_at_zero_after_the_last_step(schedule, factors):
    factor = lr_multiplier(TrainingSection(schedule=schedule, warmup_steps=3), total_steps=7)
    assert [factor(step) for step in range(8)] == pytest.approx(factors, abs=1e-12)


def test_warm_up_longer_than_the_run_keeps_rising():
    factor = lr_multiplier(TrainingSection(schedule="linear", warmup_steps=9), total_steps=4)
    assert [factor(step) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
