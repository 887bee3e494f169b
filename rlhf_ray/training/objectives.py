"""What each stage minimises, as small picklable objects that a trainer calls once a micro-batch.

Each divides its sums by the counts of the whole optimizer step (`totals`), so shares of micro-batches and ranks add up
to the global mean. The mathematics is in `algorithms/`; here it meets models and packed batches.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rlhf_ray.algorithms.correction import importance_weights
from rlhf_ray.algorithms.kl import Estimator, kl_loss
from rlhf_ray.algorithms.losses import entropy_loss, nll_loss, policy_loss, value_loss
from rlhf_ray.algorithms.preference import bradley_terry_loss, dpo_loss, ipo_loss
from rlhf_ray.models.reading import body_inputs
from rlhf_ray.packing import PackedBatch

Share = tuple[Tensor, dict[str, Tensor]]

# What the importance weights add up to, and their logged names.
CORRECTION = {
    "weight": "sampling/importance_weight/mean",
    "truncated": "sampling/importance_weight/truncated",
    "masked": "sampling/importance_weight/masked",
}


def _divided(sums: dict[str, Tensor], total: float, names: dict[str, str]) -> dict[str, Tensor]:
    """The sums that are logged, as shares of the global mean, under their logged names."""
    return {logged: sums[name] / total for name, logged in names.items()}


def _pair_weight(batch: PackedBatch) -> float:
    """Sum of the weights of a batch's pairs; both sequences of a pair carry its weight."""
    return 0.0 if batch.is_empty else float(batch.seq_fields["weight"][0::2].sum())


@dataclass(frozen=True)
class LanguageModeling:
    """Negative log-likelihood per target token: supervised fine-tuning."""

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Target tokens."""
        return {"tokens": batch.num_targets}

    def loss(self, model: nn.Module, batch: PackedBatch, totals: dict[str, float]) -> Share:
        """Share of the mean negative log-likelihood, in nats per token."""
        logprobs, _ = model(**body_inputs(batch), target_index=batch.target_index)
        return nll_loss(logprobs)[0] / totals["tokens"], {}


@dataclass(frozen=True)
class PreferenceReward:
    """Bradley-Terry loss on pairs packed as chosen, rejected, chosen, rejected (a pair in one micro-batch)."""

    label_smoothing: float = 0.0
    centering_coef: float = 0.0
    margin: bool = False

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Pairs, by weight."""
        return {"pairs": _pair_weight(batch)}

    def loss(self, model: nn.Module, batch: PackedBatch, totals: dict[str, float]) -> Share:
        """Share of the mean loss of a pair."""
        scores = model(**body_inputs(batch), read_index=batch.last_index)
        chosen, rejected, weights = scores[0::2], scores[1::2], batch.seq_fields["weight"][0::2]
        margins = batch.seq_fields["margin"][0::2]
        if batch.is_empty:  # its one dummy sequence still gives the gradients that other ranks wait for
            return scores.sum() * 0.0, {}
        loss, sums = bradley_terry_loss(
            chosen,
            rejected,
            weights,
            margins if self.margin else None,
            self.label_smoothing,
            self.centering_coef,
        )
        total = totals["pairs"]
        return loss / total, {name: value / total for name, value in sums.items()}


@dataclass(frozen=True)
class DirectPreference:
    """DPO, conservative DPO or IPO on pairs packed as above; `ref_logprob` is the reference's sum of each reply."""

    beta: float
    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Pairs, by weight."""
        return {"pairs": _pair_weight(batch)}

    def loss(self, model: nn.Module, batch: PackedBatch, totals: dict[str, float]) -> Share:
        """Share of the mean loss of a pair."""
        logprobs, _ = model(**body_inputs(batch), target_index=batch.target_index)
        if batch.is_empty:
            return logprobs.sum() * 0.0, {}
        summed = batch.sum_by_sequence(logprobs)
        reference = batch.seq_fields["ref_logprob"]
        pairs = (summed[0::2], summed[1::2], reference[0::2], reference[1::2])
        weights = batch.seq_fields["weight"][0::2]
        if self.kind == "ipo":
            lengths = batch.sum_by_sequence(torch.ones_like(logprobs))
            loss, sums = ipo_loss(*pairs, lengths[0::2], lengths[1::2], self.beta, weights)
        else:
            loss, sums = dpo_loss(*pairs, self.beta, self.label_smoothing, weights)
        total = totals["pairs"]
        return loss / total, {name: value / total for name, value in sums.items()}


@dataclass(frozen=True)
class PolicyUpdate:
    """PPO's clipped surrogate, with an optional entropy bonus, KL loss and pretraining mix (ptx).

    Batches hold responses (sequence field `ptx` 0) with token fields `advantages`, `old_logprobs`, `ref_logprobs`,
    `engine_logprobs`, and demonstrations (`ptx` 1) that only the last term reads.

    Attributes:
        temperature: the sampling temperature; log-probabilities of responses are at it, those of ptx at 1.
        one_step: this is the only optimizer step on these responses, so the policy being trained is the one before the
            update: its own log-probabilities, detached, are the old ones, and `old_logprobs` is not read.
        importance_cap: largest importance weight of a token that other weights sampled (`algorithms.correction`);
            None weighs all alike.
    """

    clip_range: float
    temperature: float
    one_step: bool
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: Estimator | None = None
    ptx_coef: float = 0.0
    importance_cap: float | None = None

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Response tokens and demonstration tokens."""
        ptx_tokens = int(self._is_ptx(batch).sum())
        return {"tokens": batch.num_targets - ptx_tokens, "ptx_tokens": ptx_tokens}

    def loss(self, model: nn.Module, batch: PackedBatch, totals: dict[str, float]) -> Share:
        """Share of the mean loss of a response token, plus `ptx_coef` times that of a demonstration token."""
        is_ptx = self._is_ptx(batch)
        mixed = bool(is_ptx.any())
        logprobs, entropy = model(
            **body_inputs(batch),
            target_index=batch.target_index,
            temperature=torch.where(is_ptx, 1.0, self.temperature) if mixed else self.temperature,
            with_entropy=self.entropy_coef > 0,
        )
        loss, metrics = logprobs.sum() * 0.0, {}
        if mixed:
            share = nll_loss(logprobs[is_ptx])[0] / totals["ptx_tokens"]
            loss = loss + self.ptx_coef * share
            metrics["loss/ptx_avg"] = share.detach()
        if not bool(is_ptx.all()):
            kept = ~is_ptx
            share, of_responses = self._response_loss(
                logprobs[kept],
                None if entropy is None else entropy[kept],
                {name: batch.targets(name)[kept] for name in batch.token_fields},
                batch.sequence_ids[batch.target_index][kept],
                totals["tokens"],
            )
            loss = loss + share
            metrics.update(of_responses)
        return loss, metrics

    def _is_ptx(self, batch: PackedBatch) -> Tensor:
        """Which targets belong to demonstrations, [N] bool."""
        return batch.seq_fields["ptx"][batch.sequence_ids[batch.target_index]] > 0

    def _response_loss(
        self,
        logprobs: Tensor,
        entropy: Tensor | None,
        fields: dict[str, Tensor],
        sequence_ids: Tensor,
        total: float,
    ) -> Share:
        old = logprobs.detach() if self.one_step else fields["old_logprobs"]
        weights, metrics = None, {}
        if self.importance_cap is not None:
            weights, sums = importance_weights(old, fields["engine_logprobs"], sequence_ids, self.importance_cap)
            metrics = _divided(sums, total, CORRECTION)
        loss, sums = policy_loss(logprobs, old, fields["advantages"], self.clip_range, weights)
        metrics |= _divided(
            sums,
            total,
            {
                "policy_loss": "loss/policy_avg",
                "clipfrac": "policy/clipfrac_avg",
                "approxkl": "policy/approxkl_avg",
                "ratio": "val/ratio",
            },
        )
        if entropy is not None:
            bonus, sums = entropy_loss(entropy)
            loss = loss + self.entropy_coef * bonus
            metrics["policy/entropy_avg"] = sums["entropy"] / total
        if self.kl_estimator is not None:
            penalty, sums = kl_loss(logprobs, fields["ref_logprobs"], self.kl_estimator)
            loss = loss + self.kl_coef * penalty
            metrics["loss/kl_avg"] = sums["kl"] / total
        if self.one_step:
            metrics.update(_engine_mismatch(logprobs.detach(), fields["engine_logprobs"], total))
        return loss / total, metrics


def _engine_mismatch(logprobs: Tensor, engine_logprobs: Tensor, total: float) -> dict[str, Tensor]:
    """The metrics of `algorithms.mismatch`, as shares, of the policy before the update."""
    difference = logprobs - engine_logprobs
    ratio = difference.exp()
    return {
        "sampling/sampling_logp_difference/mean": difference.abs().sum() / total,
        "sampling/sampling_logp_difference/max": difference.abs().max(),
        "sampling/importance_sampling_ratio/mean": ratio.sum() / total,
        "sampling/importance_sampling_ratio/min": ratio.min(),
        "sampling/importance_sampling_ratio/max": ratio.max(),
        "sampling/kl": (ratio - 1.0 - difference).sum() / total,
    }


@dataclass(frozen=True)
class ValueUpdate:
    """The critic's clipped squared error; token fields `old_values` and `returns`."""

    clip_range: float

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Response tokens."""
        return {"tokens": batch.num_targets}

    def loss(self, model: nn.Module, batch: PackedBatch, totals: dict[str, float]) -> Share:
        """Share of the mean loss of a response token."""
        # The value of the state before token t is read at t-1.
        values = model(**body_inputs(batch), read_index=batch.target_index - 1)
        if batch.is_empty:
            return values.sum(), {}
        loss, sums = value_loss(values, batch.targets("old_values"), batch.targets("returns"), self.clip_range)
        total = totals["tokens"]
        return loss / total, _divided(
            sums, total, {"value_loss": "loss/value_avg", "value_clipfrac": "val/clipfrac_avg"}
        )
