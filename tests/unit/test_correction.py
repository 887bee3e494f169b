"""Importance weights: literal values, and that they make another policy's samples speak for the trained one."""

import pytest
import torch

from rlhf_ray.algorithms.correction import importance_weights
from rlhf_ray.algorithms.losses import policy_loss
from rlhf_ray.errors import EngineError


def f64(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_weights_equal_the_case_worked_by_hand():
    # Sequence 0: ratios 3 and 0.75, geometric mean 1.5, within [1/2, 2]: 3 is cut to 2.
    # Sequence 1: ratios 4 and 1.9, mean sqrt(7.6) = 2.76: masked. Sequence 2: ratio 0.4: masked.
    ratios = f64([3.0, 0.75, 4.0, 1.9, 0.4])
    behaviour = f64([-1.0, -2.0, -3.0, -4.0, -5.0])
    weights, sums = importance_weights(behaviour + ratios.log(), behaviour, torch.tensor([0, 0, 1, 1, 2]), 2.0)
    torch.testing.assert_close(weights, f64([2.0, 0.75, 0.0, 0.0, 0.0]))
    found = {name: float(value) for name, value in sums.items()}
    assert found == pytest.approx({"weight": 2.75, "masked": 3.0, "truncated": 2.0})


def test_tokens_of_a_sequence_need_not_lie_together():
    ratios = f64([3.0, 4.0, 0.75, 2.0])
    weights, _ = importance_weights(ratios.log(), torch.zeros(4).double(), torch.tensor([0, 1, 0, 1]), 2.0)
    torch.testing.assert_close(weights, f64([2.0, 0.0, 0.75, 0.0]))


def test_equal_policies_have_weight_one_and_no_gradient():
    logprobs = f64([-1.0, -0.5]).requires_grad_()
    weights, sums = importance_weights(logprobs, logprobs.detach(), torch.tensor([0, 1]), 2.0)
    assert weights.tolist() == [1.0, 1.0]
    assert not weights.requires_grad
    assert (float(sums["masked"]), float(sums["truncated"])) == (0.0, 0.0)


def test_a_ratio_that_overflows_is_masked_and_not_infinite():
    weights, _ = importance_weights(torch.tensor([0.0]), torch.tensor([-1000.0]), torch.tensor([0]), 2.0)
    assert weights.tolist() == [0.0]


def test_no_tokens_have_no_weights():
    empty = torch.zeros(0)
    weights, sums = importance_weights(empty, empty, torch.zeros(0, dtype=torch.long), 2.0)
    assert (len(weights), float(sums["weight"])) == (0, 0.0)


def test_what_is_not_finite_raises():
    with pytest.raises(EngineError, match="behaviour_logprobs"):
        importance_weights(torch.tensor([0.0]), torch.tensor([float("nan")]), torch.tensor([0]), 2.0)


def test_weighted_samples_of_another_policy_have_the_gradient_of_ones_own():
    """E_behaviour[w A grad log pi] = E_pi[A grad log pi], summed over all tokens of a small vocabulary."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    behaviour = torch.log_softmax(logits.detach() + 0.2 * torch.randn(6).double(), -1)
    advantages = torch.randn(6, dtype=torch.float64)
    logprobs = torch.log_softmax(logits, -1)
    weights, _ = importance_weights(logprobs.detach(), behaviour, torch.arange(6), 10.0)
    # Every token once, as often as the behaviour policy would sample it.
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, 0.2, weights * behaviour.exp())
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (own,) = torch.autograd.grad(-(logprobs.detach().exp() * advantages * logprobs).sum(), logits)
    torch.testing.assert_close(found, own)
