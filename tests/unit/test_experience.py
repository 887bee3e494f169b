"""From scored trajectories to training data, by literal numbers."""

import math

import numpy as np
import pytest
import torch
from config_values import PPO

from rlhf_ray.algorithms.rewards import RunningNormalizer
from rlhf_ray.config import PPOConfig, from_dict
from rlhf_ray.config.ppo import RewardFunctionItem
from rlhf_ray.data.formats import Prompt
from rlhf_ray.driver.experience import Experience, build_experience, shape_scores
from rlhf_ray.errors import BudgetExhausted, RewardError
from rlhf_ray.scoring.scorer import ScoredTrajectory, check_share
from rlhf_ray.trajectory import Trajectory, VersionSpan

PLAIN = ("ppo.gamma=1.0", "ppo.lam=0.5", "ppo.whiten_advantages=false")


def config(*overrides: str) -> PPOConfig:
    return from_dict(PPO, "ppo", [*PLAIN, *overrides])


def scored(
    uid: str,
    prompt_ids: list[int],
    response_ids: list[int],
    logprobs: list[float],
    ref_logprobs: list[float],
    values: list[float],
    finish_reason: str,
    **rewards: float | None,
) -> ScoredTrajectory:
    trajectory = Trajectory(
        uid,
        0,
        np.array(prompt_ids, np.int32),
        np.array(response_ids, np.int32),
        np.array(logprobs, np.float32),
        finish_reason,
        [VersionSpan(7, 0, len(response_ids))],
    )
    prompt = Prompt(uid, f"ask {uid}", {}, "rows.jsonl:1", prompt_ids)
    return ScoredTrajectory(
        trajectory, prompt, f"reply {uid}", torch.tensor(ref_logprobs), torch.tensor(values), rewards
    )


def ended(score: float | None = 1.0) -> ScoredTrajectory:
    """Log-ratios 0.5, -1 and 0; the last value, of the state after the end, must not be read."""
    return scored(
        "a", [1, 2], [10, 11, 4], [-1.0, -2.0, -3.0], [-1.5, -1.0, -3.0], [0.1, 0.2, 0.3, 9.0], "stop", model=score
    )


def cut(score: float | None = 2.0) -> ScoredTrajectory:
    """Log-ratios 0.5 and 0.5; 0.7 is the value of the state at the limit."""
    return scored("b", [3], [12, 13], [-0.5, -1.5], [-1.0, -2.0], [0.5, 0.6, 0.7], "length", model=score)


def build(items: list[ScoredTrajectory], *overrides: str, kl_coef: float = 0.1, logprobs=None) -> Experience:
    return build_experience(items, logprobs, config(*overrides), kl_coef, RunningNormalizer())


def fields(experience: Experience, name: str) -> list[list[float]]:
    chosen = experience.critic if name in ("old_values", "returns") else experience.policy
    return [sequence.token_fields[name].tolist() for sequence in chosen]


def approx(rows: list[list[float]]) -> list:
    return [pytest.approx(row, abs=1e-6) for row in rows]


def test_rewards_advantages_and_returns_stand_at_their_response_tokens():
    """Rewards are -0.05, 0.1, 1.0 and -0.05, 1.45 (the score 2 less 0.5 for the missing end)."""
    experience = build([ended(), cut()], "reward.missing_eos_penalty=0.5")
    assert [sequence.input_ids.tolist() for sequence in experience.policy] == [[1, 2, 10, 11, 4], [3, 12, 13]]
    assert [sequence.loss_mask.tolist() for sequence in experience.policy] == [
        [False] * 2 + [True] * 3,
        [False, True, True],
    ]
    assert fields(experience, "advantages") == approx([[0, 0, 0.325, 0.55, 0.7], [0, 0.825, 1.55]])
    assert fields(experience, "returns") == approx([[0, 0, 0.425, 0.75, 1.0], [0, 1.325, 2.15]])
    assert fields(experience, "old_values") == approx([[0, 0, 0.1, 0.2, 0.3], [0, 0.5, 0.6]])
    assert fields(experience, "old_logprobs") == approx([[0, 0, -1, -2, -3], [0, -0.5, -1.5]])
    assert fields(experience, "engine_logprobs") == fields(experience, "old_logprobs")
    assert fields(experience, "ref_logprobs") == approx([[0, 0, -1.5, -1, -3], [0, -1, -2]])
    assert [sequence.fields for sequence in experience.policy] == [{"ptx": 0.0}, {"ptx": 0.0}]
    assert [s.input_ids.tolist() for s in experience.critic] == [s.input_ids.tolist() for s in experience.policy]


def test_metrics_are_means_over_responses():
    experience = build([ended(), cut()], "reward.missing_eos_penalty=0.5")
    assert experience.kl == pytest.approx(0.25)
    assert experience.metrics == pytest.approx(
        {
            "objective/kl": 0.25,  # of -0.5 and 1.0
            "objective/scores": 1.25,
            "objective/scores_std": 0.25,
            "objective/non_score_reward": -0.025,
            "objective/rlhf_reward": 1.225,
            "objective/entropy": 4.0,
            "completions/mean_length": 2.5,
            "completions/min_length": 2.0,
            "completions/max_length": 3.0,
            "completions/clipped_ratio": 0.5,
            "completions/mean_terminated_length": 3.0,
            "data/excluded": 0.0,
            "val/explained_variance": 0.504390,
            "rewards/model/mean": 1.5,
            "rewards/model/std": 0.5,
        },
        abs=1e-6,
    )


def test_samples_are_a_row_a_response():
    experience = build([ended(), cut()], "reward.missing_eos_penalty=0.5")
    assert experience.samples == [
        {
            "uid": "a",
            "sample": 0,
            "prompt": "ask a",
            "completion": "reply a",
            "score": 1.0,
            "excluded": None,
            "rewards/model": 1.0,
            "kl": pytest.approx(-0.5),
            "length": 3,
            "finish_reason": "stop",
            "weight_version": 7,
            "oldest_version": 7,
        },
        {
            "uid": "b",
            "sample": 0,
            "prompt": "ask b",
            "completion": "reply b",
            "score": 1.5,
            "excluded": None,
            "rewards/model": 2.0,
            "kl": pytest.approx(1.0),
            "length": 2,
            "finish_reason": "length",
            "weight_version": 7,
            "oldest_version": 7,
        },
    ]


def test_trainers_own_logprobs_take_the_place_of_the_engines_in_kl_and_ratio():
    """With the reference's log-probabilities as the policy's there is no KL penalty left."""
    one = ended()
    experience = build([one], logprobs=[one.ref_logprobs])
    assert experience.kl == 0.0
    assert fields(experience, "old_logprobs") == approx([[0, 0, -1.5, -1, -3]])
    assert fields(experience, "engine_logprobs") == approx([[0, 0, -1, -2, -3]])
    # Rewards 0, 0, 1: residuals 0.1, 0.1, 0.7.
    assert fields(experience, "advantages") == approx([[0, 0, 0.325, 0.45, 0.7]])


def test_kl_in_the_loss_is_not_taken_off_the_reward_as_well():
    overrides = ("ppo.kl_placement=loss", "ppo.kl_estimator=k3")
    experience = build([ended()], *overrides)
    assert fields(experience, "advantages") == approx([[0, 0, 0.325, 0.45, 0.7]])
    assert experience.metrics["objective/non_score_reward"] == 0.0
    assert experience.kl == pytest.approx(-0.5)


def test_responses_without_score_are_left_out_and_not_scored_zero():
    experience = build([ended(None), cut(), ended(float("nan"))], "reward.missing_eos_penalty=0.5")
    assert [sequence.input_ids.tolist() for sequence in experience.policy] == [[3, 12, 13]]
    assert fields(experience, "advantages") == approx([[0, 0.825, 1.55]])
    assert fields(experience, "old_logprobs") == approx([[0, -0.5, -1.5]])
    assert experience.metrics["data/excluded"] == 2.0
    assert experience.metrics["objective/scores"] == 1.5
    assert [row["score"] for row in experience.samples] == [None, 1.5, None]
    assert [row["kl"] for row in experience.samples] == [None, pytest.approx(1.0), None]


def test_trainers_logprobs_are_those_of_the_responses_that_are_kept():
    logprobs = [torch.tensor([-9.0, -9.0, -9.0]), torch.tensor([-0.25, -0.75])]
    experience = build([ended(None), cut()], logprobs=logprobs)
    assert fields(experience, "old_logprobs") == approx([[0, -0.25, -0.75]])


def test_no_score_at_all_is_an_error():
    with pytest.raises(RewardError, match="no reward scored any of the 2 responses"):
        build([ended(None), cut(None)])


def test_advantages_are_whitened_over_all_responses_together():
    experience = build([ended(), cut()], "reward.missing_eos_penalty=0.5", "ppo.whiten_advantages=true")
    # 0.325, 0.55, 0.7, 0.825, 1.55: mean 0.79, unbiased variance 0.2151875.
    deviation = 0.2151875**0.5
    raw = [[0.325, 0.55, 0.7], [0.825, 1.55]]
    expected = [[0.0] * (2 - i) + [(a - 0.79) / deviation for a in raw[i]] for i in range(2)]
    assert fields(experience, "advantages") == approx(expected)
    assert fields(experience, "returns") == approx([[0, 0, 0.425, 0.75, 1.0], [0, 1.325, 2.15]])


def test_bootstrap_value_of_a_cut_response_enters_and_that_of_an_ended_one_does_not():
    same = {"response_ids": [12, 13], "logprobs": [0.0, 0.0], "ref_logprobs": [0.0, 0.0], "values": [0.5, 0.6, 0.7]}
    pair = [
        scored(uid, [3], finish_reason=reason, model=2.0, **same) for uid, reason in (("a", "stop"), ("b", "length"))
    ]
    experience = build(pair)
    assert fields(experience, "returns") == approx([[0, 1.3, 2.0], [0, 1.65, 2.7]])


def test_scores_are_summed_normalised_clipped_and_then_penalised():
    overrides = (
        "reward.models.0.weight=2.0",
        "reward.functions=[{path: 'package.module:brevity', weight: 0.5}]",
        "reward.normalize=running",
        "reward.clip=1.0",
        "reward.missing_eos_penalty=0.25",
    )
    items = [ended(), cut(), ended()]
    for item, model, brevity in zip(items, (1.0, 2.0, 4.5), (4.0, 0.0, 2.0), strict=True):
        item.rewards = {"model": model, "brevity": brevity}
    normalizer = RunningNormalizer()
    # Sums 4, 4 and 10: mean 6, unbiased deviation sqrt(12); the third is (10 - 6) / 3.46 = 1.15, clipped to 1.
    low = -2 / 12**0.5
    assert shape_scores(items, config(*overrides), normalizer) == pytest.approx([low, low - 0.25, 1.0])
    assert (normalizer.count, normalizer.mean) == (3, 6.0)
    # The next batch is seen together with this one: 4, 4, 10, 4 have mean 5.5 and variance 27 / 3.
    more = shape_scores(items[:1], config(*overrides), normalizer)
    assert (normalizer.count, normalizer.mean) == (4, 5.5)
    assert more == pytest.approx([-1.5 / 9**0.5])


def test_a_function_may_leave_out_as_many_responses_as_its_share_says():
    def item(share: float) -> RewardFunctionItem:
        return RewardFunctionItem(path="module:function", min_scored=share)

    check_share(item(0.5), [1.0, None, 0.0, math.nan])
    check_share(item(1.0), [1.0, 0.0])
    message = r"module:function scored 1 of the iteration's 3 responses, and its `min_scored` is 0.5"
    with pytest.raises(BudgetExhausted, match=message) as error:
        check_share(item(0.5), [1.0, None, math.inf])
    assert error.value.exit_code == 3
    with pytest.raises(BudgetExhausted):
        check_share(item(1e-9), [None, None])


def test_score_missing_from_one_of_two_rewards_excludes_the_response():
    items = [ended(), cut()]
    items[0].rewards = {"model": 1.0, "brevity": None}
    items[1].rewards = {"model": 1.0, "brevity": 3.0}
    overrides = "reward.functions=[{path: 'package.module:brevity', weight: 0.0}]"
    assert shape_scores(items, config(overrides), RunningNormalizer()) == [None, 1.0]


def test_single_response_token_is_not_whitened():
    one = scored("a", [1], [4], [-1.0], [-1.0], [0.25, 0.0], "stop", model=1.0)
    experience = build([one], "ppo.whiten_advantages=true")
    assert fields(experience, "advantages") == approx([[0, 0.75]])
    assert "val/explained_variance" not in experience.metrics
