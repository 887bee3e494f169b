"""From scored trajectories to what the policy and the critic train on: a pure function of its arguments."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algorithms.advantages import gae, token_rewards, whiten
from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.algorithms.rewards import RunningNormalizer, clip_scores, combine_scores, penalize_missing_eos
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.errors import RewardError
from rlhf_ray.packing import Sequence
from rlhf_ray.scoring.scorer import ScoredTrajectory, response_sequence, reward_names


@dataclass
class Experience:
    """One iteration's training data.

    Attributes:
        policy: sequences with token fields `advantages`, `old_logprobs`, `ref_logprobs`, `engine_logprobs` and the
            sequence field `ptx` 0; fields are zero on prompt tokens, which are no targets.
        critic: the same sequences with `old_values` and `returns`.
        kl: mean over responses of the KL estimate summed over their tokens, in nats.
        metrics: what is logged of them.
        samples: a row a response, for the sample table.
    """

    policy: list[Sequence]
    critic: list[Sequence]
    kl: float
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


def shape_scores(
    scored: list[ScoredTrajectory], config: PPOConfig, normalizer: RunningNormalizer
) -> list[float | None]:
    """The one score of each response: weighted sum, normalisation, clipping, missing-EOS penalty, in this order.

    None where a reward function had no score to give.
    """
    weights = reward_names(config)
    scores = combine_scores({name: [one.rewards[name] for one in scored] for name in weights}, weights)
    if config.reward.normalize == "running":
        normalizer.update(scores)
        scores = normalizer.normalize(scores)
    if config.reward.clip is not None:
        scores = clip_scores(scores, -config.reward.clip, config.reward.clip)
    truncated = [one.trajectory.truncated for one in scored]
    return penalize_missing_eos(scores, truncated, config.reward.missing_eos_penalty)


def build_experience(
    scored: list[ScoredTrajectory],
    policy_logprobs: list[Tensor] | None,
    config: PPOConfig,
    kl_coef: float,
    normalizer: RunningNormalizer,
) -> Experience:
    """Rewards per token, advantages and returns of one iteration.

    Args:
        scored: every trajectory of the iteration.
        policy_logprobs: the trainer's log-probabilities of the response tokens, [R] each, where several optimizer
            steps make them differ from the ones being trained; None takes the engine's, which sampled the tokens.
        kl_coef: weight of the KL penalty in the reward (0 where it is in the loss).
        normalizer: running score statistics, updated here.

    Raises:
        RewardError: every response was excluded.
    """
    scores = shape_scores(scored, config, normalizer)
    logprobs_of = policy_logprobs or [torch.tensor(one.trajectory.logprobs) for one in scored]
    kept = [index for index, score in enumerate(scores) if score is not None]
    if not kept:
        raise RewardError(f"no reward scored any of the {len(scored)} responses; nothing is left to train on")
    used = [scored[index] for index in kept]
    kept_scores = torch.tensor([scores[index] for index in kept], dtype=torch.float32)
    lengths = torch.tensor([len(one.trajectory.response_ids) for one in used])
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])

    logprobs = torch.cat([logprobs_of[index] for index in kept])
    reference = torch.cat([one.ref_logprobs for one in used])
    kl = kl_estimate(logprobs, reference, "k1")
    in_reward = kl_coef if config.ppo.kl_placement == "reward" else 0.0
    rewards = token_rewards(kept_scores, kl, in_reward, cu)
    values = torch.cat([_values(one)[:-1] for one in used])
    # A response cut at the limit would have gone on: the value of its last state stands for the rest.
    bootstrap = torch.stack([_values(one)[-1] * float(one.trajectory.truncated) for one in used])
    advantages, returns = gae(rewards, values, bootstrap, cu, config.ppo.gamma, config.ppo.lam)
    weights = whiten(advantages) if config.ppo.whiten_advantages and len(advantages) > 1 else advantages

    fields = {
        "advantages": weights,
        "old_logprobs": logprobs,
        "ref_logprobs": reference,
        "engine_logprobs": torch.cat([torch.tensor(one.trajectory.logprobs) for one in used]),
    }
    responses = [response_sequence(one.trajectory) for one in used]
    kl_of = torch.stack([part.sum() for part in kl.split(lengths.tolist())])
    return Experience(
        policy=_with_fields(responses, fields, lengths, {"ptx": 0.0}),
        critic=_with_fields(responses, {"old_values": values, "returns": returns}, lengths, {}),
        kl=float(kl_of.mean()),
        metrics=_metrics(used, len(scored), kept_scores, kl_of, in_reward, values, returns, logprobs),
        samples=_samples(scored, scores, dict(zip(kept, kl_of.tolist(), strict=True))),
    )


def _values(scored: ScoredTrajectory) -> Tensor:
    if scored.values is None:
        raise ValueError(f"{scored.trajectory.uid}: advantages need the critic's values; compute them first")
    return scored.values


def _with_fields(
    responses: list[Sequence], fields: dict[str, Tensor], lengths: Tensor, per_sequence: dict[str, float]
) -> list[Sequence]:
    """Spread flat response-token fields over the sequences, zero on the prompts."""
    split = {name: values.float().split(lengths.tolist()) for name, values in fields.items()}
    sequences = []
    for index, response in enumerate(responses):
        token_fields = {}
        for name, parts in split.items():
            full = torch.zeros(len(response))
            full[response.loss_mask] = parts[index]
            token_fields[name] = full
        sequences.append(Sequence(response.input_ids, response.loss_mask, token_fields, per_sequence))
    return sequences


def _metrics(
    used: list[ScoredTrajectory],
    num_responses: int,
    scores: Tensor,
    kl_of: Tensor,
    kl_coef: float,
    values: Tensor,
    returns: Tensor,
    logprobs: Tensor,
) -> dict[str, float]:
    lengths = torch.tensor([float(len(one.trajectory.response_ids)) for one in used])
    ended = torch.tensor([not one.trajectory.truncated for one in used])
    non_score = -kl_coef * kl_of
    metrics: dict[str, Any] = {
        "objective/kl": kl_of.mean(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(correction=0),
        "objective/non_score_reward": non_score.mean(),
        "objective/rlhf_reward": (scores + non_score).mean(),
        "objective/entropy": -logprobs.sum() / len(used),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1.0 - ended.float().mean(),
        "data/excluded": float(num_responses - len(used)),
    }
    if bool(ended.any()):
        metrics["completions/mean_terminated_length"] = lengths[ended].mean()
    if len(returns) > 1 and float(returns.var()) > 0:
        metrics["val/explained_variance"] = 1.0 - (returns - values).var() / returns.var()
    for name in used[0].rewards:
        raw = torch.tensor([one.rewards[name] for one in used])
        metrics[f"rewards/{name}/mean"] = raw.mean()
        metrics[f"rewards/{name}/std"] = raw.std(correction=0)
    return {name: float(value) for name, value in metrics.items()}


def _samples(
    scored: list[ScoredTrajectory], scores: list[float | None], kl_of: dict[int, float]
) -> list[dict[str, Any]]:
    rows = []
    for index, (one, score) in enumerate(zip(scored, scores, strict=True)):
        content = one.prompt.content
        rows.append(
            {
                "uid": one.trajectory.uid,
                "sample": one.trajectory.sample,
                "prompt": content if isinstance(content, str) else "\n".join(m["content"] for m in content),
                "completion": one.text,
                "score": score,
                "excluded": one.problem,
                **{f"rewards/{name}": value for name, value in one.rewards.items()},
                "kl": kl_of.get(index),
                "length": len(one.trajectory.response_ids),
                "finish_reason": one.trajectory.finish_reason,
                "weight_version": one.trajectory.versions[-1].version,
                "oldest_version": min(span.version for span in one.trajectory.versions),
            }
        )
    return rows
