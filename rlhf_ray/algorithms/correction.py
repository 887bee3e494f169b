"""Importance weights of tokens that another policy sampled than the one an update starts from.

Two distributions differ from the one that is trained: the behaviour policy, which sampled (the engine, perhaps with
older weights), and the proximal policy, which the clipped ratio is taken against (the trainer's weights before the
update). PPO's ratio corrects for neither of the first two being different: decoupled PPO (Hilton et al.,
arXiv:2110.00641, eq. 5) weighs each token's clipped term by proximal / behaviour.
"""

import torch
from torch import Tensor

from rlhf_ray.algorithms.checks import require_finite, require_same_shape


@torch.no_grad()
def importance_weights(
    proximal_logprobs: Tensor, behaviour_logprobs: Tensor, sequence_ids: Tensor, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Truncated importance weights, with sequences masked that the proximal policy hardly knows.

        w_t = min(exp(proximal_t - behaviour_t), cap)
        w_t = 0 for all tokens of a sequence whose geometric mean of exp(proximal_t - behaviour_t) is outside
              [1 / cap, cap]

    The truncation is that of Ionides (2008), as Yao et al. (2025) apply it to engines that differ from their trainer;
    TRL's `vllm_importance_sampling_mode` "token_truncate". The mask differs from TRL's "sequence_mask", which compares
    the product over the tokens, so that a long response is masked for many small differences.

    Args:
        proximal_logprobs: of the sampled tokens under the policy before the update, [N].
        behaviour_logprobs: of the same tokens under the policy that sampled them, [N].
        sequence_ids: to which sequence each token belongs, integers from 0, [N].
        cap: largest weight, > 1.

    Returns:
        Weights [N], and sums of `weight` (of all tokens), `masked` (tokens of masked sequences) and `truncated` (tokens
        whose ratio is above the cap).

    Raises:
        ValueError: shapes differ. EngineError: an input is not finite.
    """
    require_same_shape(
        proximal_logprobs=proximal_logprobs, behaviour_logprobs=behaviour_logprobs, sequence_ids=sequence_ids
    )
    require_finite(proximal_logprobs=proximal_logprobs, behaviour_logprobs=behaviour_logprobs)
    log_ratio = proximal_logprobs - behaviour_logprobs
    count = int(sequence_ids.max()) + 1 if len(sequence_ids) else 0
    zeros = log_ratio.new_zeros(count)
    tokens = zeros.index_add(0, sequence_ids, torch.ones_like(log_ratio)).clamp(min=1)
    mean = zeros.index_add(0, sequence_ids, log_ratio) / tokens
    log_cap = torch.tensor(cap, dtype=log_ratio.dtype, device=log_ratio.device).log()
    known = (mean.abs() <= log_cap)[sequence_ids]
    # The logarithm is cut, not the ratio, which might overflow before.
    weights = torch.minimum(log_ratio, log_cap).exp() * known
    return weights, {
        "weight": weights.sum(),
        "masked": (~known).to(log_ratio.dtype).sum(),
        "truncated": (log_ratio > log_cap).to(log_ratio.dtype).sum(),
    }
