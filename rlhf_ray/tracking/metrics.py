"""Every metric that a stage may log: the one place where its key, unit and meaning are defined.

Names follow TRL where TRL has the metric. A key with `<name>` stands for one key for each name, such as
`rewards/<name>/mean` for the reward component `<name>`.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

SFT, REWARD, DPO, PPO = "sft", "reward", "dpo", "ppo"
OFFLINE = (SFT, REWARD, DPO)
ALL = (*OFFLINE, PPO)


@dataclass(frozen=True)
class Metric:
    """What one key means.

    Attributes:
        unit: unit of the value; "1" for a pure number, "nat" for logarithms to base e.
        meaning: what is computed, over which elements.
        stages: which stages log it.
    """

    unit: str
    meaning: str
    stages: tuple[str, ...]


_TRAINING = {
    "loss": Metric("nat", "Training loss of the optimizer step, divided by its global count of targets", OFFLINE),
    "grad_norm": Metric("1", "Euclidean norm of the gradient over all parameters, before clipping", OFFLINE),
    "learning_rate": Metric("1", "Learning rate of the optimizer step", OFFLINE),
    "skipped_updates": Metric(
        "1", "1 where loss or gradient was not finite, and the weights stayed as they were", OFFLINE
    ),
    "unchanged_updates": Metric("1", "Updates in a row that changed no parameter, skipped ones aside", OFFLINE),
    "epoch": Metric("epochs", "Rows consumed / rows of the data set", OFFLINE),
    "num_tokens": Metric("tokens", "Tokens of the step, prompts included", OFFLINE),
    "tokens_per_second": Metric("tokens/s", "Tokens of the step / step_time, prompts included", OFFLINE),
    "step_time": Metric("s", "Wall time of the optimizer step", OFFLINE),
}

_SFT = {
    "eval/loss": Metric("nat", "Loss on the held-out rows, divided by their count of targets", OFFLINE),
}

_REWARD_MODEL = {
    "accuracy": Metric("1", "Share of pairs whose chosen reply scores higher; a tie counts one half", (REWARD,)),
    "margin": Metric("1", "Mean of score(chosen) - score(rejected)", (REWARD,)),
    "mean_reward": Metric("1", "Mean score of all replies", (REWARD,)),
    "eval/accuracy": Metric("1", "accuracy on the held-out pairs", (REWARD,)),
    "eval/margin": Metric("1", "margin on the held-out pairs", (REWARD,)),
    "eval/mean_reward": Metric("1", "mean_reward on the held-out pairs", (REWARD,)),
    "eval/ece": Metric(
        "1",
        "Expected calibration error: mean over pairs of abs(accuracy - mean confidence) of the pair's bin, "
        "confidence = sigmoid(abs(margin))",
        (REWARD,),
    ),
    "eval/length_correlation": Metric(
        "1",
        "Pearson correlation of the scores of replies and their lengths in tokens",
        (REWARD,),
    ),
    "eval/accuracy_longer_chosen": Metric("1", "accuracy where the chosen reply is the longer one", (REWARD,)),
    "eval/accuracy_shorter_chosen": Metric("1", "accuracy where the chosen reply is the shorter one", (REWARD,)),
}

_DPO = {
    "rewards/chosen": Metric("nat", "Mean of beta * (log p - log p_ref) of the chosen replies", (DPO,)),
    "rewards/rejected": Metric("nat", "Mean of beta * (log p - log p_ref) of the rejected replies", (DPO,)),
    "rewards/margins": Metric("nat", "rewards/chosen - rewards/rejected", (DPO,)),
    "rewards/accuracies": Metric("1", "Share of pairs with rewards/margins above 0", (DPO,)),
    "logps/chosen": Metric("nat", "Mean log-probability of a chosen reply, summed over its tokens", (DPO,)),
    "logps/rejected": Metric("nat", "Mean log-probability of a rejected reply, summed over its tokens", (DPO,)),
    "eval/rewards/chosen": Metric("nat", "rewards/chosen on the held-out pairs", (DPO,)),
    "eval/rewards/rejected": Metric("nat", "rewards/rejected on the held-out pairs", (DPO,)),
    "eval/rewards/margins": Metric("nat", "rewards/margins on the held-out pairs", (DPO,)),
    "eval/rewards/accuracies": Metric("1", "rewards/accuracies on the held-out pairs", (DPO,)),
    "eval/logps/chosen": Metric("nat", "logps/chosen on the held-out pairs", (DPO,)),
    "eval/logps/rejected": Metric("nat", "logps/rejected on the held-out pairs", (DPO,)),
}

_PPO_OBJECTIVE = {
    "objective/kl": Metric("nat", "Mean over responses of the sum over tokens of log p - log p_ref (k1)", (PPO,)),
    "objective/kl_coef": Metric("1", "KL coefficient of the iteration", (PPO,)),
    "objective/entropy": Metric("nat", "Mean over responses of the sum over tokens of -log p", (PPO,)),
    "objective/scores": Metric("1", "Mean score of the responses: the weighted sum of reward components", (PPO,)),
    "objective/scores_std": Metric("1", "Standard deviation of the scores over the responses", (PPO,)),
    "objective/rlhf_reward": Metric("1", "objective/scores + objective/non_score_reward", (PPO,)),
    "objective/non_score_reward": Metric(
        "1",
        "Mean over responses of the sum over tokens of -kl_coef * (log p - log p_ref)",
        (PPO,),
    ),
    "rewards/<name>/mean": Metric("1", "Mean of one reward component, before its weight", (PPO,)),
    "rewards/<name>/std": Metric("1", "Standard deviation of one reward component over the responses", (PPO,)),
}

_PPO_UPDATE = {
    "policy/approxkl_avg": Metric("nat", "Mean over tokens and updates of (log p - log p_old)^2 / 2", (PPO,)),
    "policy/clipfrac_avg": Metric("1", "Share of tokens whose clipped policy loss exceeds the unclipped", (PPO,)),
    "policy/entropy_avg": Metric("nat", "Mean over tokens of the entropy of the policy's distribution", (PPO,)),
    "loss/policy_avg": Metric("1", "Clipped policy loss, mean over updates", (PPO,)),
    "loss/value_avg": Metric("1", "Clipped value loss, mean over updates", (PPO,)),
    "loss/kl_avg": Metric("nat", "KL loss before its coefficient, mean over updates", (PPO,)),
    "loss/ptx_avg": Metric("nat", "Pretraining-mix loss before its coefficient, mean over updates", (PPO,)),
    "val/ratio": Metric("1", "Mean over tokens and updates of p / p_old", (PPO,)),
    "val/clipfrac_avg": Metric("1", "Share of tokens whose clipped value loss exceeds the unclipped", (PPO,)),
    "val/explained_variance": Metric("1", "1 - Var(return - value) / Var(return), values before the update", (PPO,)),
    "grad_norm/policy": Metric("1", "Norm of the policy's gradient before clipping, mean over updates", (PPO,)),
    "grad_norm/critic": Metric("1", "Norm of the critic's gradient before clipping, mean over updates", (PPO,)),
    "skipped_updates/policy": Metric("1", "Updates of the policy whose loss or gradient was not finite", (PPO,)),
    "skipped_updates/critic": Metric("1", "Updates of the critic whose loss or gradient was not finite", (PPO,)),
    "unchanged_updates/policy": Metric("1", "Updates in a row that left the policy as it was, skipped aside", (PPO,)),
    "unchanged_updates/critic": Metric("1", "Updates in a row that left the critic as it was, skipped aside", (PPO,)),
    "lr/policy": Metric("1", "Learning rate of the policy", (PPO,)),
    "lr/critic": Metric("1", "Learning rate of the critic", (PPO,)),
}

_PPO_ROLLOUT = {
    "completions/mean_length": Metric("tokens", "Mean length of the responses", (PPO,)),
    "completions/min_length": Metric("tokens", "Shortest response", (PPO,)),
    "completions/max_length": Metric("tokens", "Longest response", (PPO,)),
    "completions/clipped_ratio": Metric("1", "Share of responses cut at the token limit", (PPO,)),
    "completions/mean_terminated_length": Metric(
        "tokens", "Mean length of the responses that the policy ended; null when it ended none", (PPO,)
    ),
    "sampling/sampling_logp_difference/mean": Metric(
        "nat", "Mean over tokens of abs(log p of the engine - log p of the trainer), same weights", (PPO,)
    ),
    "sampling/sampling_logp_difference/max": Metric("nat", "The largest such difference", (PPO,)),
    "sampling/sampling_logp_difference/alarm": Metric(
        "1", "1 where the mean is beyond what rounding explains (1e-3 in fp32, 5e-2 in bf16), with a warning", (PPO,)
    ),
    "sampling/importance_sampling_ratio/min": Metric("1", "Smallest p of the trainer / p of the engine", (PPO,)),
    "sampling/importance_sampling_ratio/mean": Metric("1", "Mean p of the trainer / p of the engine", (PPO,)),
    "sampling/importance_sampling_ratio/max": Metric("1", "Largest p of the trainer / p of the engine", (PPO,)),
    "sampling/staleness/mean": Metric(
        "1", "Policy updates between the weights that sampled a token and those that it trained, mean", (PPO,)
    ),
    "sampling/staleness/max": Metric("1", "Such updates of the oldest token", (PPO,)),
    "sampling/importance_weight/mean": Metric(
        "1", "Weight of a token where `ppo.max_staleness` is above 0, masked ones as 0", (PPO,)
    ),
    "sampling/importance_weight/truncated": Metric("1", "Share of tokens whose ratio is above the cap", (PPO,)),
    "sampling/importance_weight/masked": Metric(
        "1", "Share of tokens in responses that the policy hardly knows, which train nothing", (PPO,)
    ),
    "sampling/kl": Metric(
        "nat", "KL divergence of the engine from the trainer with the same weights, k3, mean over tokens", (PPO,)
    ),
    "rollout/tokens_per_second": Metric("tokens/s", "Response tokens of the iteration / time/generate", (PPO,)),
    "rollout/engines": Metric("engines", "Rollout engines that sampled at the end of the iteration", (PPO,)),
    "rollout/weight_version": Metric("1", "Version of the policy weights that the engines sampled with", (PPO,)),
    "rollout/probe_difference": Metric(
        "nat", "Largest abs(log p of an engine - log p of the trainer) of the probe after the transfer", (PPO,)
    ),
    "data/epoch": Metric("epochs", "Prompts consumed / prompts of the data set", (PPO,)),
    "data/excluded": Metric("responses", "Responses left out of the update for want of a score", (PPO,)),
}

_PPO_TIME = {
    "time/wait": Metric("s", "That training waited for the iteration's scored responses", (PPO,)),
    "time/generate": Metric("s", "From the first prompt sent to the last response", (PPO,)),
    "time/score": Metric("s", "From the last response to the last score", (PPO,)),
    "time/advantages": Metric(
        "s", "KL, rewards and advantages, with the forward pass for old log-probabilities where one is needed", (PPO,)
    ),
    "time/train": Metric("s", "Updates of policy and critic, which run at the same time", (PPO,)),
    "time/transfer": Metric("s", "Weights to the engines, the probe included", (PPO,)),
    "time/iteration": Metric("s", "The whole iteration", (PPO,)),
    "time/checkpoint": Metric(
        "s",
        "That the loop stood still for the checkpoint before; its files are written while it goes on",
        (PPO,),
    ),
}

GLOSSARY: dict[str, Metric] = (
    _TRAINING | _SFT | _REWARD_MODEL | _DPO | _PPO_OBJECTIVE | _PPO_UPDATE | _PPO_ROLLOUT | _PPO_TIME
)

_KNOWN = re.compile("|".join(re.escape(key).replace("<name>", "[^/]+") for key in GLOSSARY))


def check_known(keys: Iterable[str]) -> None:
    """Checks that every key is in the glossary.

    Raises:
        ValueError: one is not; names the closest key.
    """
    for key in keys:
        if not _KNOWN.fullmatch(key):
            close = difflib.get_close_matches(key, GLOSSARY, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown metric {key}{hint} Define new ones in rlhf_ray/tracking/metrics.py")
