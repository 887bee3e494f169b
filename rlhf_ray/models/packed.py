"""Models over packed batches: per-token log-probabilities, and scalars read at chosen tokens.

Both classes hold a transformers model, call each of its modules once a forward pass, whatever the batch, and
never touch a weight outside its module. So they work under DeepSpeed ZeRO-3, which gathers a module's parameters
from all ranks when the module is called.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_ray.models.architectures import logit_transform
from rlhf_ray.models.attention import packing_kwargs
from rlhf_ray.models.logprobs import kept_tokens, token_logprobs


class _PackedModel(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @property
    def config(self) -> PreTrainedConfig:
        """The transformers configuration of the model inside."""
        return self.model.config

    def transformers_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each parameter once, under the name that transformers and vLLM give it."""
        return self.model.named_parameters()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each layer's activations in the backward pass instead of keeping them."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def compile_layers(self) -> None:
        """Let torch.compile fuse what lies between the matrix products and the attention of each layer.

        Layers are compiled where they are, one by one: they are alike, so that one of each kind is translated for all,
        and names of parameters stay. Attention runs as it does otherwise, with a break before and after it. Gradients
        are those of the layers as they were, up to rounding.
        """
        (layers,) = (child for child in self.model.base_model.children() if isinstance(child, nn.ModuleList))
        for layer in layers:
            layer.compile(dynamic=True)

    def _hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        """Final hidden states of the body, [T, H]."""
        output = self.model.base_model(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            use_cache=False,
            **packing_kwargs(cu_seqlens, self.model.config._attn_implementation),
        )
        return output.last_hidden_state[0]


class PackedCausalLM(_PackedModel):
    """A causal language model that returns log-probabilities of chosen tokens of a packed batch.

    Args:
        model: A causal language model of transformers, loaded with an attention that `attention.py` names. Its
            output layer is replaced by one with the same parameters that returns log-probabilities.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        head = cast(nn.Linear, model.get_output_embeddings())
        model.set_output_embeddings(_LogprobHead(head, logit_transform(model.config)))

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        target_index: torch.Tensor,
        temperature: float | torch.Tensor = 1.0,
        with_entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probability of each target token given the tokens before it in its sequence.

        Args:
            input_ids: int64 [T], sequences end to end.
            position_ids: int64 [T], restarting at 0 with each sequence.
            cu_seqlens: int32 [S+1], where each sequence starts, and T.
            target_index: int64 [N], positions in the row of the tokens asked for; never the first of a
                sequence.
            temperature: Divides the logits, as the sampler that produced the tokens did; one number, or [N].
            with_entropy: Also return the entropy of the distribution each target was drawn from.

        Returns:
            Log-probabilities, float32 [N], and entropies in nats, float32 [N], or None. With N = 0 they are
            empty and a backward pass through them still gives every parameter a gradient, of zeros: each rank
            must take part in each collective, work or not.
        """
        hidden = self._hidden_states(input_ids, position_ids, cu_seqlens)
        count = target_index.numel()
        if count == 0:
            rows, targets = hidden[:1], input_ids[:1]
            temperature = 1.0
        else:
            rows, targets = hidden[target_index - 1], input_ids[target_index]
        head = cast(nn.Module, self.model.get_output_embeddings())
        logprobs, entropy = head(rows, targets, temperature, with_entropy)
        return logprobs[:count], entropy[:count] if entropy is not None else None


class PackedScalarModel(_PackedModel):
    """A reward model or critic: a body with a head that maps a hidden state to one number, computed in
    float32.

    Args:
        model: A sequence classification model of transformers with one label. Its head is replaced by an
            equal one that computes in float32; the names of its parameters do not change.
        dropout: Probability of dropping an entry of the hidden state before the head, in training mode.
    """

    def __init__(self, model: PreTrainedModel, dropout: float = 0.0):
        super().__init__(model)
        head = cast(nn.Linear, model.score)
        model.score = _Float32Linear(head)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        read_index: torch.Tensor,
    ) -> torch.Tensor:
        """The scalar at chosen tokens of a packed batch.

        Args:
            input_ids: int64 [T], sequences end to end.
            position_ids: int64 [T], restarting at 0 with each sequence.
            cu_seqlens: int32 [S+1], where each sequence starts, and T.
            read_index: int64 [N], positions in the row whose hidden states are read: a sequence's last token
                for its reward, the token before an action for the value of the state it was taken in.

        Returns:
            float32 [N]. With N = 0 it is empty and a backward pass still gives every parameter a gradient of
            zeros.
        """
        hidden = self._hidden_states(input_ids, position_ids, cu_seqlens)
        count = read_index.numel()
        rows = hidden[read_index] if count else hidden[:1]
        head = cast(nn.Module, self.model.score)
        return head(self.dropout(rows)).squeeze(-1)[:count]


class _LogprobHead(nn.Module):
    """The output layer of a causal language model, returning log-probabilities; keeps the parameters' names.

    The chunks of `token_logprobs` are cut inside this module and not around it: under ZeRO-3 each call of a
    module gathers its weights from all ranks, and ranks with unequal numbers of targets have unequal numbers of
    chunks, so calling a module for each chunk would leave ranks waiting for each other forever.
    """

    def __init__(self, head: nn.Linear, transform: Callable[[torch.Tensor], torch.Tensor] | None):
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self._transform = transform

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        kept = kept_tokens(len(self.weight), self.weight.itemsize)
        return token_logprobs(hidden, self._logits, targets, temperature, kept=kept, with_entropy=with_entropy)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, self.weight, self.bias)
        return logits if self._transform is None else self._transform(logits)


class _Float32Linear(nn.Module):
    """A linear head that computes in float32 and keeps the parameters' names."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden.float(), self.weight.float(), bias)
