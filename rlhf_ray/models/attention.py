"""Attention over packed sequences, registered with transformers under the name `packed_sdpa`.

A packed batch is one row of tokens, [1, T], that holds several sequences end to end. Each attention layer
runs `scaled_dot_product_attention` once for each sequence on slices of the row, so no [T, T] mask is ever
built and no sequence can see another. The result for one sequence does not depend on its neighbours in the
row.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.utils import is_flash_attn_2_available

from rlhf_ray.errors import ModelError

AUTO = "auto"
PACKED_SDPA = "packed_sdpa"
FLASH_ATTENTION = "flash_attention_2"


# Both kinds of attention stay out of what torch.compile translates: the one is a loop over sequences, of which every
# batch has another number, the other a kernel.
_flash_attention = torch.compiler.disable(flash_attention_forward)


def register() -> None:
    """Make both kinds of attention known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    AttentionMaskInterface.register(PACKED_SDPA, _no_mask)
    AttentionInterface.register(FLASH_ATTENTION, _flash_attention)


def choose_attention(dtype: torch.dtype, asked: str = AUTO) -> str:
    """Return the attention implementation for a model of this dtype on this machine.

    FlashAttention takes half precision on CUDA alone; everything else runs `packed_sdpa`.

    Args:
        dtype: Of the model.
        asked: `packed_sdpa`, `flash_attention_2`, or `auto` for the latter wherever it runs.

    Raises:
        ModelError: FlashAttention was asked for by name and cannot run here.
    """
    lacking = [
        what
        for what, there in (
            ("bf16", dtype == torch.bfloat16),
            ("a GPU", torch.cuda.is_available()),
            ("the package flash-attn", is_flash_attn_2_available()),
        )
        if not there
    ]
    if asked == FLASH_ATTENTION and lacking:
        raise ModelError(
            f"training.attention {FLASH_ATTENTION} needs {' and '.join(lacking)}, which this process does not have. "
            f"Set it to {PACKED_SDPA}, or to {AUTO}, which takes what there is."
        )
    return PACKED_SDPA if lacking or asked == PACKED_SDPA else FLASH_ATTENTION


def packing_kwargs(cu_seqlens: torch.Tensor, attention: str) -> dict[str, Any]:
    """Return what the attention layers need to know of the packing, as keyword arguments for a model's body.

    Args:
        cu_seqlens: int32 [S+1], where each sequence starts, and the end of the last.
        attention: `packed_sdpa` or `flash_attention_2`.

    What a layer needs to know off the GPU comes from it here, once for each forward pass, so that a GPU is
    synchronised once and not in every layer.
    """
    bounds = cu_seqlens.cpu()
    if attention == FLASH_ATTENTION:
        longest = int(bounds.diff().max())
        return {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    return {"sequence_bounds": bounds}


@torch.compiler.disable
def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sequence_bounds: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a packed row; the signature is transformers' attention
    interface.

    Args:
        module: The attention layer (unused; part of the interface).
        query: [1, heads, T, head_dim].
        key: [1, key-value heads, T, head_dim].
        value: [1, key-value heads, T, head_dim].
        attention_mask: Must be None: the mask follows from `sequence_bounds`.
        dropout: Probability of dropping an attention weight.
        scaling: Factor on the scores; None means 1 / sqrt(head_dim).
        sliding_window: A token sees itself and the `sliding_window - 1` tokens before it; None means all.
        softcap: Gemma 2's cap on the scores, `softcap * tanh(score / softcap)`; None means no cap.
        sequence_bounds: int32 [S+1] on the CPU, where each sequence starts, and T. Required: an architecture
            that loses it on the way here would let sequences see each other. A tensor and no list of numbers,
            for which torch.compile would translate the layer anew.
        kwargs: What else the architecture passes; attention sinks and position biases are refused.

    Returns:
        ([1, T, heads, head_dim], None).

    Raises:
        ModelError: The layer asks for something that this function does not compute, a mask was given, or no
            lengths were.
    """
    unsupported = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if attention_mask is not None or unsupported:
        what = ", ".join(unsupported) or "an attention mask"
        raise ModelError(
            f"{PACKED_SDPA} got {what} from {type(module).__name__}, which packed attention does not "
            "compute. Use a model of a supported architecture."
        )
    if sequence_bounds is None:
        raise ModelError(
            f"{PACKED_SDPA} got no bounds of sequences from {type(module).__name__}: call the model through "
            "PackedCausalLM or PackedScalarModel."
        )
    dtype = query.dtype
    if query.device.type == "cpu" and dtype.itemsize == 2:
        # PyTorch's backward pass of attention on a CPU takes more than twice as long in half precision.
        query, key, value = query.float(), key.float(), value.float()
    outputs = []
    lengths = sequence_bounds.diff().tolist()
    pieces = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    for q, k, v in pieces:
        if softcap is not None:
            output = _softcapped_attention(q, k, v, dropout, scaling, sliding_window, softcap)
        else:
            window = _window_mask(q.shape[2], sliding_window, q.device)
            output = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=window,
                dropout_p=dropout,
                is_causal=window is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1).to(dtype), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Build no mask: `packed_sdpa` knows the sequences from their lengths."""


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """The causal band of a sliding window, bool [length, length]; None where it covers the sequence."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)


def _softcapped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float,
) -> torch.Tensor:
    """Attention of one sequence with capped scores, which PyTorch's function has no argument for."""
    length, head_dim = query.shape[2], query.shape[3]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = scaling if scaling is not None else 1.0 / math.sqrt(head_dim)
    scores = query @ key.transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap)
    mask = _window_mask(length, sliding_window, query.device)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), p=dropout)
    return weights @ value
