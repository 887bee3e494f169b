"""Losses on flat tensors of target tokens.

Every loss returns `(sum, metrics)`: the sum over the tokens that it was given, and detached sums under the
names that are logged. The caller gives valid tokens only, and divides both by the count of valid tokens of
the whole optimizer step, so that ranks and micro-batches do not change the gradient; where the engine
averages gradients over ranks, it multiplies the loss by their number. A sum over no tokens is zero and still
runs backward, which a rank without work needs. Inputs that are not finite raise: see `checks`.
"""

import torch
from torch import Tensor

from rlhf_ray.algorithms.checks import require_finite, require_same_shape

SummedLoss = tuple[Tensor, dict[str, Tensor]]


def nll_loss(logprobs: Tensor) -> SummedLoss:
    """Negative log-likelihood of the targets: supervised fine-tuning, and the pretraining term of PPO-ptx.

        loss = -sum_t log pi(token_t)

    InstructGPT, arXiv:2203.02155, eq. 2, third term, as a loss. Its coefficient is the caller's.

    Args:
        logprobs: with gradient, [N].

    Returns:
        (sum, {"nll"}).

    Raises:
        EngineError: a log-probability is not finite.
    """
    require_same_shape(logprobs=logprobs)
    require_finite(logprobs=logprobs)
    loss = -logprobs.sum()
    return loss, {"nll": loss.detach()}


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float, weights: Tensor | None = None
) -> SummedLoss:
    """Clipped surrogate of PPO, Schulman et al., arXiv:1707.06347, eq. 7, with the sign of a loss.

        ratio_t = exp(logprobs_t - old_logprobs_t)
        loss    = sum_t w_t * max(-A_t * ratio_t, -A_t * clip(ratio_t, 1 - clip_range, 1 + clip_range))

    With weights it is decoupled PPO, Hilton et al., arXiv:2110.00641, eq. 5.

    Args:
        logprobs: of the sampled tokens under the policy being trained, with gradient, [N].
        old_logprobs: under the policy at the start of the iteration, [N].
        advantages: [N].
        clip_range: epsilon, > 0.
        weights: importance weights w_t of `correction.importance_weights`, without gradient, [N]; None for 1.

    Returns:
        (sum, sums of `policy_loss`; `clipfrac`: tokens whose clipped term is the larger, and which so have no
        gradient; `approxkl`: 0.5 * log-ratio**2, as TRL; `ratio`).

    Raises:
        ValueError: shapes differ. EngineError: an input is not finite, or the ratio overflows, where the
            clipped loss would be finite and its gradient not.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    require_finite(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    require_finite(ratio=ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    of_token = torch.maximum(unclipped, clipped)
    if weights is not None:
        require_same_shape(logprobs=logprobs, weights=weights)
        of_token = of_token * weights
    loss = of_token.sum()
    return loss, {
        "policy_loss": loss.detach(),
        "clipfrac": (clipped > unclipped).detach().to(ratio.dtype).sum(),
        "approxkl": 0.5 * log_ratio.detach().square().sum(),
        "ratio": ratio.detach().sum(),
    }


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> SummedLoss:
    """Clipped squared error of the critic, as in OpenAI baselines (ppo2) and TRL; not in the PPO paper.

        v_clip = clip(values, old_values - clip_range, old_values + clip_range)
        loss   = 0.5 * sum_t max((values_t - returns_t)**2, (v_clip_t - returns_t)**2)

    Args:
        values: of the states before the tokens, with gradient, [N].
        old_values: those that the advantages were computed with, [N].
        returns: [N].
        clip_range: > 0; `math.inf` for the plain squared error.

    Returns:
        (sum, sums of `value_loss` and `value_clipfrac`: tokens whose clipped term is the larger).

    Raises:
        ValueError: shapes differ. EngineError: an input is not finite.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    require_finite(values=values, old_values=old_values, returns=returns)
    # The step from old_values is clipped, which equals the formula and keeps the result finite at math.inf.
    clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    unclipped = (values - returns).square()
    clipped = (clipped_values - returns).square()
    loss = 0.5 * torch.maximum(unclipped, clipped).sum()
    return loss, {
        "value_loss": loss.detach(),
        "value_clipfrac": (clipped > unclipped).detach().to(values.dtype).sum(),
    }


def entropy_loss(entropy: Tensor) -> SummedLoss:
    """Entropy bonus with the sign of a loss: term S of PPO, arXiv:1707.06347, eq. 9.

    Its coefficient is the caller's.

    Args:
        entropy: of the policy's distribution at each token, in nats, with gradient, [N].

    Returns:
        (-sum, {"entropy": sum}).

    Raises:
        EngineError: an entropy is not finite.
    """
    require_same_shape(entropy=entropy)
    require_finite(entropy=entropy)
    total = entropy.sum()
    return -total, {"entropy": total.detach()}
