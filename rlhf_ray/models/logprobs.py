"""Log-probabilities of tokens from hidden states, without ever holding the logits of a whole batch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Tokens whose logits are made at a time.
CHUNK_TOKENS = 1024
# Bytes of logits that may wait for the backward pass instead of being computed again; one chunk always may.
KEPT_BYTES = 64 * 2**20
# Tokens whose logits are in float32 at a time: few enough for a processor's cache.
BLOCK_TOKENS = 128


def kept_tokens(vocab: int, itemsize: int) -> int:
    """How many tokens' logits, of this many bytes each, are kept for the backward pass."""
    return max(CHUNK_TOKENS, KEPT_BYTES // (vocab * itemsize))


def token_logprobs(
    hidden: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    chunk: int = CHUNK_TOKENS,
    kept: int = CHUNK_TOKENS,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target under softmax(logits / temperature), and the entropy of that
    distribution.

    The logits are computed `chunk` tokens at a time. The backward pass starts with the last chunk: the last `kept`
    tokens' logits wait for it, those before are computed again (activation checkpointing) when it has freed them. The
    softmax is in float32 (float64 for a model in float64), a block of tokens at a time.

    Args:
        hidden: [N, H], the final hidden state before each target.
        lm_head: Maps hidden states [n, H] to logits [n, V], a new tensor: the backward pass overwrites it.
        targets: int64 [N].
        temperature: Divides the logits; one number, or float32 [N], one for each target.
        chunk: Tokens in a chunk.
        kept: Tokens at the end whose logits are kept.
        with_entropy: Also return the entropy, in nats.

    Returns:
        Log-probabilities, float32 [N], and the entropy, float32 [N], or None. Both carry gradients.
    """
    logprobs, entropies = [], []
    for start in range(0, max(1, len(targets)), chunk):
        rows = slice(start, start + chunk)
        divisor = temperature if isinstance(temperature, (int, float)) else temperature[rows]
        arguments = (hidden[rows], lm_head, targets[rows], divisor, with_entropy)
        if torch.is_grad_enabled() and len(targets) - start > kept:
            logprob, entropy = checkpoint(_chunk_logprobs, *arguments, use_reentrant=False)
        else:
            logprob, entropy = _chunk_logprobs(*arguments)
        logprobs.append(logprob)
        entropies.append(entropy)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


def _chunk_logprobs(
    hidden: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float | Tensor,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    return _FromLogits.apply(lm_head(hidden), targets, temperature, with_entropy)


class _FromLogits(torch.autograd.Function):
    """Log-probabilities and entropies of rows of logits; their gradient takes the logits' own memory.

    With z = logits / temperature, the log-probability of target t is log p_t = z_t - logsumexp(z), the entropy
    H = -sum_j p_j log p_j, and their derivatives by z_j are [j = t] - p_j and -p_j (log p_j + H).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float | Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        normalizers = torch.empty(len(logits), dtype=dtype, device=logits.device)
        logprobs = torch.empty_like(normalizers)
        entropies = torch.empty_like(normalizers) if with_entropy else None
        for rows in _blocks(len(logits)):
            scaled = _scaled(logits, temperature, rows, dtype)
            distribution = scaled.log_softmax(-1)
            logprobs[rows] = distribution.gather(-1, targets[rows, None])[:, 0]
            normalizers[rows] = scaled.gather(-1, targets[rows, None])[:, 0] - logprobs[rows]
            if entropies is not None:
                entropies[rows] = -(distribution.exp() * distribution).sum(-1)
        ctx.save_for_backward(logits, targets, normalizers, entropies)
        ctx.temperature = temperature
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor, of_entropies: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, targets, normalizers, entropies = ctx.saved_tensors
        of_logprobs = of_logprobs / ctx.temperature
        of_entropies = None if entropies is None else of_entropies / ctx.temperature
        for rows in _blocks(len(logits)):
            distribution = _scaled(logits, ctx.temperature, rows, normalizers.dtype) - normalizers[rows, None]
            factor = -of_logprobs[rows, None]
            if of_entropies is not None:
                factor = factor - of_entropies[rows, None] * (distribution + entropies[rows, None])
            gradient = distribution.exp_().mul_(factor)
            gradient.scatter_add_(-1, targets[rows, None], of_logprobs[rows, None])
            logits[rows] = gradient
        return logits, None, None, None


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK_TOKENS) for start in range(0, count, BLOCK_TOKENS))


def _scaled(logits: Tensor, temperature: float | Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of logits / temperature, not to be written to."""
    block = logits[rows].to(dtype)
    if isinstance(temperature, Tensor):
        return block / temperature[rows, None]
    return block if temperature == 1.0 else block / temperature
