"""Token losses: literal values, corner identities, and the same gradient for every split of a batch."""

import math

import pytest
import torch

from rlhf_ray.algorithms.losses import entropy_loss, nll_loss, policy_loss, value_loss
from rlhf_ray.algorithms.preference import bradley_terry_loss, dpo_loss
from rlhf_ray.errors import EngineError
from rlhf_ray.packing import PackedBatch, Sequence, pack, partition


def f64(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- policy loss -----------------------------------------------------------------------------------------


def test_policy_loss_equals_the_four_cases_worked_by_hand():
    # clip 0.2. ratio 1.5, A 2: max(-3, -2.4) = -2.4, clipped. ratio 1.5, A -2: max(3, 2.4) = 3.
    # ratio 0.5, A 2: max(-1, -1.6) = -1. ratio 0.5, A -2: max(1, 1.6) = 1.6, clipped. Sum 1.2.
    ratios = f64([1.5, 1.5, 0.5, 0.5])
    logprobs = ratios.log().requires_grad_()
    loss, metrics = policy_loss(logprobs, torch.zeros_like(ratios), f64([2.0, -2.0, 2.0, -2.0]), 0.2)
    assert math.isclose(loss.item(), 1.2, rel_tol=1e-12)
    assert metrics["clipfrac"].item() == 2.0
    assert math.isclose(metrics["ratio"].item(), 4.0, rel_tol=1e-12)
    assert metrics["policy_loss"].item() == loss.item()
    # 0.5 * (2 * ln(1.5)**2 + 2 * ln(2)**2) = 0.1644020 + 0.4804530
    assert math.isclose(metrics["approxkl"].item(), 0.6448549, rel_tol=1e-6)
    assert not any(metric.requires_grad for metric in metrics.values())
    loss.backward()
    # No gradient where clipped; elsewhere -A * ratio: 2 * 1.5 and -2 * 0.5.
    torch.testing.assert_close(logprobs.grad, f64([0.0, 3.0, -1.0, 0.0]))


def test_importance_weights_multiply_each_tokens_clipped_term():
    # The four cases above, -2.4, 3, -1 and 1.6, weighed by 1, 0.5, 2 and 0: -2.4 + 1.5 - 2 = -2.9.
    ratios = f64([1.5, 1.5, 0.5, 0.5])
    logprobs = ratios.log().requires_grad_()
    weights = f64([1.0, 0.5, 2.0, 0.0])
    loss, _ = policy_loss(logprobs, torch.zeros_like(ratios), f64([2.0, -2.0, 2.0, -2.0]), 0.2, weights)
    assert math.isclose(loss.item(), -2.9, rel_tol=1e-12)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, f64([0.0, 1.5, -2.0, 0.0]))


def test_at_ratio_1_the_gradient_is_that_of_reinforce_with_advantages():
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 3, 6, 2, 2])
    advantages = f64([1.0, -2.0, 0.5, 0.0, 3.0])
    logprobs = torch.log_softmax(logits, -1)[range(5), tokens]
    loss, metrics = policy_loss(logprobs, logprobs.detach(), advantages, 0.2)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (reinforce,) = torch.autograd.grad(-(advantages * logprobs).sum(), logits)
    torch.testing.assert_close(gradient, reinforce, rtol=0, atol=0)
    assert metrics["clipfrac"].item() == 0.0
    assert metrics["approxkl"].item() == 0.0
    assert metrics["ratio"].item() == 5.0


def test_inside_the_clip_range_the_loss_is_the_importance_weighted_surrogate():
    logprobs, old_logprobs, advantages = f64([-1.0, -2.0]), f64([-1.1, -1.9]), f64([3.0, -4.0])
    loss, metrics = policy_loss(logprobs, old_logprobs, advantages, 0.2)
    # -3 * exp(0.1) + 4 * exp(-0.1) = -3.3155128 + 3.6193497
    assert math.isclose(loss.item(), 0.3038369, rel_tol=1e-6)
    assert metrics["clipfrac"].item() == 0.0


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_policy_loss_never_swallows_what_is_not_finite(name, bad):
    inputs = {"logprobs": f64([-1.0, -1.0]), "old_logprobs": f64([-1.0, -1.0]), "advantages": f64([1.0, 1.0])}
    inputs[name][1] = bad
    with pytest.raises(EngineError, match=f"^{name} must be finite, found 1 of 2"):
        policy_loss(**inputs, clip_range=0.2)


def test_a_ratio_that_overflows_is_refused_although_the_clipped_loss_is_finite():
    with pytest.raises(EngineError, match="ratio must be finite"):
        policy_loss(torch.tensor([0.0]), torch.tensor([-100.0]), torch.tensor([1.0]), 0.2)


def test_losses_refuse_tensors_that_are_not_aligned():
    with pytest.raises(ValueError, match="one shape"):
        policy_loss(torch.zeros(3), torch.zeros(3), torch.zeros(1), 0.2)
    with pytest.raises(ValueError, match="one shape"):
        value_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2), 0.2)


# --- value, likelihood and entropy -----------------------------------------------------------------------


def test_value_loss_equals_the_cases_worked_by_hand():
    # clip 0.2 around 1. v 2 -> 1.2, return 0: max(4, 1.44) = 4. v 2 -> 1.2, return 3: max(1, 3.24) = 3.24,
    # clipped. v 1.1, return 2: 0.81 both. 0.5 * (4 + 3.24 + 0.81) = 4.025.
    values = f64([2.0, 2.0, 1.1]).requires_grad_()
    loss, metrics = value_loss(values, f64([1.0, 1.0, 1.0]), f64([0.0, 3.0, 2.0]), 0.2)
    assert math.isclose(loss.item(), 4.025, rel_tol=1e-12)
    assert metrics["value_clipfrac"].item() == 1.0
    assert metrics["value_loss"].item() == loss.item()
    loss.backward()
    # v - return where it is not clipped: 2, none, -0.9.
    torch.testing.assert_close(values.grad, f64([2.0, 0.0, -0.9]))


def test_value_loss_with_an_infinite_range_is_the_squared_error():
    values = f64([2.0, -5.0]).requires_grad_()
    loss, metrics = value_loss(values, f64([1.0, 1.0]), f64([0.0, 3.0]), math.inf)
    assert loss.item() == 34.0  # 0.5 * (4 + 64)
    assert metrics["value_clipfrac"].item() == 0.0
    loss.backward()
    assert values.grad.tolist() == [2.0, -8.0]


def test_nll_and_entropy_are_signed_sums():
    loss, metrics = nll_loss(f64([-1.5, -0.5]))
    assert (loss.item(), metrics["nll"].item()) == (2.0, 2.0)
    loss, metrics = entropy_loss(f64([1.5, 0.5]))
    assert (loss.item(), metrics["entropy"].item()) == (-2.0, 2.0)


def test_nll_value_and_entropy_refuse_what_is_not_finite():
    bad, good = f64([0.0, math.nan]), f64([0.0, 0.0])
    with pytest.raises(EngineError):
        nll_loss(bad)
    with pytest.raises(EngineError):
        entropy_loss(bad)
    for inputs in ([bad, good, good], [good, bad, good], [good, good, bad]):
        with pytest.raises(EngineError):
            value_loss(*inputs, 0.2)


def test_losses_over_no_tokens_are_zero_and_run_backward():
    parameter = torch.ones(3, requires_grad=True)
    none = (parameter * 2.0)[:0]
    losses = [nll_loss(none), entropy_loss(none), policy_loss(none, none.detach(), none.detach(), 0.2)]
    losses.append(value_loss(none, none.detach(), none.detach(), 0.2))
    total = torch.stack([loss for loss, _ in losses]).sum()
    assert total.item() == 0.0
    total.backward()
    assert parameter.grad.tolist() == [0.0, 0.0, 0.0]


# --- the same gradient for every split -------------------------------------------------------------------

VOCABULARY, NUM_SEQUENCES = 11, 9


class TinyModel(torch.nn.Module):
    """Scores the next token from the current one and its position; no token sees another sequence."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.nn.Parameter(torch.randn(VOCABULARY, 6, generator=generator, dtype=torch.float64))
        self.positions = torch.nn.Parameter(torch.randn(16, 6, generator=generator, dtype=torch.float64))
        self.head = torch.nn.Parameter(torch.randn(6, VOCABULARY, generator=generator, dtype=torch.float64))

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        return torch.tanh(self.tokens[batch.input_ids] + self.positions[batch.position_ids])

    def logprobs(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        index = batch.target_index
        distribution = torch.log_softmax(self.hidden(batch)[index - 1] @ self.head, -1)
        logprobs = distribution.gather(1, batch.input_ids[index, None]).squeeze(1)
        return logprobs, -(distribution.exp() * distribution).sum(-1)

    def values(self, batch: PackedBatch, index: torch.Tensor) -> torch.Tensor:
        return (self.hidden(batch)[index] @ self.head)[:, 0]


def make_sequences() -> list[Sequence]:
    generator = torch.Generator().manual_seed(2)

    def noise(length: int) -> torch.Tensor:
        return torch.randn(length, generator=generator, dtype=torch.float64)

    sequences = []
    # Pairs (0, 1), (2, 3), ...: the even ones are the preferred replies. The last one stands alone.
    for number, length in enumerate([5, 9, 3, 12, 7, 2, 6, 10, 4]):
        fields = {"old_logprobs": noise(length) - 2.5, "advantages": noise(length)}
        fields |= {"old_values": noise(length), "returns": noise(length)}
        sequences.append(
            Sequence(
                torch.randint(VOCABULARY, (length,), generator=generator),
                torch.arange(length) >= 1 + number % (length - 1),
                fields,
                {"weight": 0.5 + number // 2},
            )
        )
    return sequences


def token_loss(model: TinyModel, batch: PackedBatch) -> torch.Tensor:
    logprobs, entropy = model.logprobs(batch)
    policy, _ = policy_loss(logprobs, batch.targets("old_logprobs"), batch.targets("advantages"), 0.2)
    values = model.values(batch, batch.target_index - 1)
    value, _ = value_loss(values, batch.targets("old_values"), batch.targets("returns"), 0.5)
    return policy + 0.1 * value + 0.01 * entropy_loss(entropy)[0] + 0.3 * nll_loss(logprobs)[0]


def pairs(batch: PackedBatch, per_sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = [s for s, index in enumerate(batch.indices) if index % 2 == 0]
    rejected = [batch.indices.index(batch.indices[s] + 1) for s in chosen]
    return per_sequence[chosen], per_sequence[rejected]


def dpo(model: TinyModel, batch: PackedBatch) -> torch.Tensor:
    chosen, rejected = pairs(batch, batch.sum_by_sequence(model.logprobs(batch)[0]))
    references = pairs(batch, batch.sum_by_sequence(batch.targets("old_logprobs")))
    return dpo_loss(chosen, rejected, *references, beta=0.1, label_smoothing=0.1)[0]


def reward_model(model: TinyModel, batch: PackedBatch) -> torch.Tensor:
    chosen, rejected = pairs(batch, model.values(batch, batch.last_index))
    weights, _ = pairs(batch, batch.seq_fields["weight"].double())
    return bradley_terry_loss(chosen, rejected, weights, label_smoothing=0.05, centering_coef=0.01)[0]


def gradient(loss_of, sequences, shares: list[list[list[int]]], count: float) -> list[torch.Tensor]:
    """Gradients of `shares`, averaged over ranks as DeepSpeed averages them, which the factor undoes."""
    averages = None
    for micro_batches in shares:
        model = TinyModel()
        for micro_batch in micro_batches:
            loss_sum = loss_of(model, pack(sequences, micro_batch))
            (loss_sum / count * len(shares)).backward()
        gradients = [parameter.grad / len(shares) for parameter in model.parameters()]
        averages = gradients if averages is None else [a + b for a, b in zip(averages, gradients, strict=True)]
    return averages


def whole_batch_gradient(loss_of, sequences, count: float) -> list[torch.Tensor]:
    """Gradient of the mean over the whole batch in one piece."""
    model = TinyModel()
    loss = loss_of(model, pack(sequences, range(len(sequences)))) / count
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("token_budget", [12, 24, 1000])
def test_token_losses_have_the_same_gradient_for_every_split(num_ranks, token_budget):
    sequences = make_sequences()
    count = sum(int(sequence.loss_mask.sum()) for sequence in sequences)
    shares = partition([len(sequence) for sequence in sequences], num_ranks, token_budget)
    split = gradient(token_loss, sequences, shares, count)
    for one, whole in zip(split, whole_batch_gradient(token_loss, sequences, count), strict=True):
        torch.testing.assert_close(one, whole, rtol=1e-12, atol=1e-14)
        assert whole.abs().max() > 1e-3


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("token_budget", [19, 1000])
@pytest.mark.parametrize("loss_of", [dpo, reward_model])
def test_pair_losses_have_the_same_gradient_for_every_split(num_ranks, token_budget, loss_of):
    sequences = make_sequences()[: NUM_SEQUENCES - 1]
    count = sum(sequence.fields["weight"] for sequence in sequences[::2]) if loss_of is reward_model else 4
    lengths = [len(sequence) for sequence in sequences]
    shares = partition(lengths, num_ranks, token_budget, group=[0, 0, 1, 1, 2, 2, 3, 3])
    split = gradient(loss_of, sequences, shares, count)
    for name, one, whole in zip(
        ["tokens", "positions", "head"], split, whole_batch_gradient(loss_of, sequences, count), strict=True
    ):
        torch.testing.assert_close(one, whole, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")
        assert whole.abs().max() > 1e-3


def test_a_rank_with_only_empty_micro_batches_leaves_the_gradient_as_it_is():
    sequences = make_sequences()[:2]
    count = sum(int(sequence.loss_mask.sum()) for sequence in sequences)
    split = gradient(token_loss, sequences, [[[0, 1]], [[]]], count)
    for one, whole in zip(split, whole_batch_gradient(token_loss, sequences, count), strict=True):
        torch.testing.assert_close(one, whole, rtol=1e-12, atol=1e-14)


def test_the_mean_of_micro_batch_means_would_be_another_gradient():
    # What global normalisation avoids: micro-batches of unequal token counts, each with its own mean.
    sequences = make_sequences()
    shares = partition([len(sequence) for sequence in sequences], 1, 24)[0]
    model = TinyModel()
    for micro_batch in shares:
        batch = pack(sequences, micro_batch)
        (token_loss(model, batch) / batch.num_targets / len(shares)).backward()
    count = sum(int(sequence.loss_mask.sum()) for sequence in sequences)
    whole = whole_batch_gradient(token_loss, sequences, count)
    assert not torch.allclose(model.head.grad, whole[2], rtol=1e-3)
