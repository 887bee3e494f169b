"""Real reference, reward and critic processes: what they say of trajectories, and how reward functions fail."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from tiny_models import make_llama, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.algorithms.rewards import RunningNormalizer
from rlhf_ray.config import PPOConfig, from_dict
from rlhf_ray.data.formats import Content, Prompt
from rlhf_ray.driver.experience import build_experience
from rlhf_ray.errors import BudgetExhausted, ConfigError
from rlhf_ray.placement.groups import reserve
from rlhf_ray.placement.plan import make_plan
from rlhf_ray.runtime.patience import Patience
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.scoring.actors import RewardFunctionActor
from rlhf_ray.scoring.scorer import ScoredTrajectory, Scorer, reward_names
from rlhf_ray.training.group import TrainerGroup
from rlhf_ray.training.trainer import TrainerSpec
from rlhf_ray.trajectory import Trajectory, VersionSpan

pytestmark = pytest.mark.system

TOLERANCE = 1e-5
TEMPERATURE = 0.7
TIMEOUT_S = 120.0
OTHER_TEXTS = ("an altogether different corpus of words", "makes other merges, and so other token ids")


@dataclass
class Setup:
    config: PPOConfig
    scorer: Scorer
    policy: str
    reward: str
    other: str


@pytest.fixture(scope="module")
def setup(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """Every kind of scorer at once: two reward models, one with a tokenizer of its own, and four functions."""
    folder = tmp_path_factory.mktemp("scoring")
    policy = make_llama(folder / "policy")
    reward = make_llama(folder / "reward", seed=1, scalar=True)
    other = make_llama(folder / "other", seed=2, scalar=True)
    make_tokenizer(texts=OTHER_TEXTS).save_pretrained(other)
    set_score_statistics(reward, mean=0.5, std=2.0)
    config = from_dict(
        {
            "run": {"dir": str(folder / "run"), "timeout_s": TIMEOUT_S},
            "data": {"path": "unused.jsonl", "max_tokens": 64},
            "policy": {"path": policy, "cpus": 0.5},
            "critic": {"cpus": 0.5},
            # Three or four of the trajectories below make a chunk.
            "reference": {"cpus": 0.25, "processes": 2, "micro_batch_tokens": 96},
            "reward": {
                "cpus": 0.5,
                "normalize": "model",
                "models": [{"path": reward}, {"path": other, "weight": 0.5}],
                "functions": [
                    {"path": "reward_functions:contract", "weight": 2.0},
                    {"path": "reward_functions:async_num_tokens", "weight": -0.1},
                    {"path": "reward_functions:strict", "timeout_s": 3.0},
                    {"path": "reward_functions:lenient", "timeout_s": 3.0, "min_scored": 1e-9},
                ],
            },
            "rollout": {"cpus": 0.1, "kv_cache_gib": 0.1, "max_new_tokens": 32, "temperature": TEMPERATURE},
            "ppo": {"iterations": 1, "prompts_per_iteration": 4, "whiten_advantages": False},
        },
        "ppo",
    )
    spec = TrainerSpec("critic", reward, "scalar", config.training, 1e-3, total_steps=1, seed=0)
    (folder / "run" / "logs").mkdir(parents=True)
    patience = Patience(TIMEOUT_S, TIMEOUT_S)
    with (
        reserve(make_plan(config), folder / "run" / "logs") as placement,
        Supervisor(folder / "run", patience) as supervisor,
    ):
        critic = TrainerGroup(spec, placement, "critic", supervisor)
        scorer = Scorer(config, placement, critic, make_tokenizer(), policy, supervisor)
        try:
            critic.start().result()
            scorer.start()
            yield Setup(config, scorer, policy, reward, other)
        finally:
            scorer.stop()
            critic.stop()


def set_score_statistics(model: str, mean: float, std: float) -> None:
    path = Path(model) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"score_mean": mean, "score_std": std}))


CONVERSATION: Content = [{"role": "user", "content": "how quick is the fox"}]


def rollout(
    count: int = 6, samples: int = 2, **columns: list[str | None]
) -> tuple[dict[str, Prompt], list[Trajectory]]:
    """Prompts, every other one a conversation, and responses to them. Columns give each prompt's value."""
    tokenizer = make_tokenizer()
    generator = torch.Generator().manual_seed(0)
    prompts, trajectories = {}, []
    for index in range(count):
        uid = f"u{(index * 5) % count}"  # not in the alphabetic order of the uids
        content = CONVERSATION if index % 2 else f"the lazy dog {index}"
        ids = (
            tokenizer.apply_chat_template(content, add_generation_prompt=True, return_dict=False)
            if index % 2
            else tokenizer.encode(content)
        )
        row = {name: values[index] for name, values in columns.items()}
        row = {"answer": index, "strict_fault": None, "lenient_fault": None} | row
        prompts[uid] = Prompt(uid, content, row, f"row {index}", ids)
        for sample in range(samples):
            response = torch.randint(5, 300, (3 + (7 * index + 5 * sample) % 17,), generator=generator).tolist()
            ended = sample == 0
            response = [*response, tokenizer.eos_token_id] if ended else response
            logprobs = torch.randn(len(response), generator=generator).sub(5).numpy()
            spans = [VersionSpan(0, 0, len(response))]
            trajectories.append(
                Trajectory(
                    uid,
                    sample,
                    np.array(ids, np.int32),
                    np.array(response, np.int32),
                    logprobs,
                    "stop" if ended else "length",
                    spans,
                )
            )
    return prompts, trajectories


@pytest.fixture(scope="module")
def scored(setup: Setup) -> list[ScoredTrajectory]:
    """Trajectories that arrived in an order that is not the prompts'."""
    prompts, trajectories = rollout()
    arrival = torch.randperm(len(trajectories), generator=torch.Generator().manual_seed(1)).tolist()
    stream = [[trajectories[i] for i in arrival[:5]], [trajectories[i] for i in arrival[5:]]]
    return setup.scorer.score(stream, prompts, with_values=True)


def test_scores_come_in_the_order_of_prompts_and_samples_whatever_the_order_of_arrival(scored: list[ScoredTrajectory]):
    _, trajectories = rollout()
    assert [(one.trajectory.uid, one.trajectory.sample) for one in scored] == [(t.uid, t.sample) for t in trajectories]
    assert [one.trajectory.response_ids.tolist() for one in scored] == [t.response_ids.tolist() for t in trajectories]
    assert all(one.prompt.uid == one.trajectory.uid for one in scored)


def test_reference_logprobs_are_the_models_at_the_sampling_temperature(setup: Setup, scored: list[ScoredTrajectory]):
    model = AutoModelForCausalLM.from_pretrained(setup.policy)
    for one in scored:
        ids = torch.from_numpy(one.trajectory.token_ids)
        with torch.no_grad():
            logprobs = (model(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        start = len(one.trajectory.prompt_ids)
        expected = logprobs[start - 1 : -1].gather(1, ids[start:, None])[:, 0]
        torch.testing.assert_close(one.ref_logprobs, expected, rtol=0, atol=TOLERANCE)


def test_values_are_the_critics_before_each_response_token_and_after_the_last(
    setup: Setup, scored: list[ScoredTrajectory]
):
    model = AutoModelForSequenceClassification.from_pretrained(setup.reward)
    for one in scored:
        ids = torch.from_numpy(one.trajectory.token_ids)
        with torch.no_grad():
            values = model.score(model.model(ids[None]).last_hidden_state)[0, :, 0]
        expected = values[len(one.trajectory.prompt_ids) - 1 :]
        assert one.values.shape == (len(one.trajectory.response_ids) + 1,)
        torch.testing.assert_close(one.values, expected, rtol=0, atol=TOLERANCE)


def test_a_reward_model_is_read_at_the_last_token_and_scaled_by_its_own_statistics(
    setup: Setup, scored: list[ScoredTrajectory]
):
    model = AutoModelForSequenceClassification.from_pretrained(setup.reward)
    for one in scored:
        ids = torch.from_numpy(one.trajectory.token_ids)[None]
        with torch.no_grad():
            raw = float(model.score(model.model(ids).last_hidden_state)[0, -1, 0])
        assert one.rewards["model_0"] == pytest.approx((raw - 0.5) / 2.0, abs=TOLERANCE)


def test_a_reward_model_with_another_tokenizer_reads_the_text_in_its_own_template(
    setup: Setup, scored: list[ScoredTrajectory]
):
    model = AutoModelForSequenceClassification.from_pretrained(setup.other)
    own, policys = make_tokenizer(texts=OTHER_TEXTS), make_tokenizer()
    assert not hasattr(AutoConfig.from_pretrained(setup.other), "score_mean")
    for one in scored:
        text = policys.decode(one.trajectory.response_ids, skip_special_tokens=True)
        assert one.text == text
        if isinstance(one.prompt.content, str):
            ids = [*own.encode(one.prompt.content + text), own.eos_token_id]
        else:
            messages = [*one.prompt.content, {"role": "assistant", "content": text}]
            ids = own.apply_chat_template(messages, return_dict=False)
        assert ids != one.trajectory.token_ids.tolist()
        with torch.no_grad():
            expected = float(model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0])
        assert one.rewards["model_1"] == pytest.approx(expected, abs=TOLERANCE)


def test_functions_get_trls_arguments_and_the_rows_columns_and_may_be_coroutines(scored: list[ScoredTrajectory]):
    for one in scored:
        assert one.rewards["contract"] == float(one.prompt.row["answer"])
        assert one.rewards["async_num_tokens"] == len(one.trajectory.response_ids)
        assert one.rewards["strict"] == one.rewards["lenient"] == 1.0


def test_the_score_is_the_weighted_sum_of_all_rewards(setup: Setup, scored: list[ScoredTrajectory]):
    assert reward_names(setup.config) == {
        "model_0": 1.0,
        "model_1": 0.5,
        "contract": 2.0,
        "async_num_tokens": -0.1,
        "strict": 1.0,
        "lenient": 1.0,
    }
    experience = build_experience(scored, None, setup.config, 0.0, RunningNormalizer())
    for one, row in zip(scored, experience.samples, strict=True):
        r = one.rewards
        expected = r["model_0"] + 0.5 * r["model_1"] + 2 * r["contract"] - 0.1 * r["async_num_tokens"] + 2.0
        assert row["score"] == pytest.approx(expected, abs=1e-5)
        assert {f"rewards/{name}": value for name, value in r.items()}.items() <= row.items()
    assert experience.metrics["data/excluded"] == 0


def named_actors() -> set[str]:
    return set(ray.util.list_named_actors())


def test_every_scorer_has_a_name_that_a_person_knows(setup: Setup):
    functions = {f"reward-{name}" for name in ("contract", "async_num_tokens", "strict", "lenient")}
    assert functions | {"reference-0", "reference-1", "reward-model_0-0", "reward-model_1-0"} <= named_actors()


# ---- reward functions that fail


@pytest.mark.parametrize("path", ["no_such_module:score", "reward_functions:no_such_function"])
def test_a_function_that_cannot_be_imported_is_an_error_that_names_it(path: str):
    with pytest.raises(ConfigError, match=rf"'{path}' cannot be imported .*package.module:function"):
        RewardFunctionActor(path).load()


def faulty(kind: str, fault: str, count: int = 2) -> tuple[dict[str, Prompt], list[Trajectory]]:
    """Prompts whose first row makes the function `kind` fail."""
    return rollout(count, 1, **{f"{kind}_fault": [fault] + [None] * (count - 1)})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", r"raised KeyError: 'no such answer'"),
        ("none", r"no finite score .* for 1 of 2 replies"),
        ("nan", r"no finite score .* for 1 of 2 replies"),
        ("inf", r"no finite score .* for 1 of 2 replies"),
        ("short", r"1 scores for 2 completions"),
        ("text", r"one number \(or None\) for each"),
        ("hang", r"no answer within 3 s \(`timeout_s`\)"),
        ("die", r"the actor died .* must not end its process"),
    ],
)
def test_a_function_that_fails_is_one_error_that_names_it_and_what_to_do(setup: Setup, fault: str, message: str):
    prompts, trajectories = faulty("strict", fault)
    with pytest.raises(BudgetExhausted, match=message) as raised:
        setup.scorer.score([trajectories], prompts, with_values=True)
    text = str(raised.value)
    assert "reward_functions:strict" in text
    assert "set its `min_scored` below 1" in text
    assert "(sample " in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("fault", "kept"),
    [("raise", 0), ("none", 1), ("nan", 1), ("inf", 1), ("short", 0), ("hang", 0), ("die", 0)],
)
def test_a_function_that_fails_excludes_its_samples_where_the_configuration_says_so(
    setup: Setup, caplog: pytest.LogCaptureFixture, fault: str, kept: int
):
    prompts, trajectories = faulty("lenient", fault)
    good_prompts, good = rollout(3, 1)
    scored = setup.scorer.score([trajectories], prompts, with_values=True)
    if kept:
        setup.scorer.check_shares(scored)
    else:
        with pytest.raises(BudgetExhausted, match="lenient scored 0 of the iteration's 2 responses"):
            setup.scorer.check_shares(scored)
    excluded = len(scored) - kept
    # It serves again afterwards, whatever happened.
    scored += setup.scorer.score([good], good_prompts, with_values=True)
    assert "reward-lenient" in named_actors()
    experience = build_experience(scored, None, setup.config, 0.0, RunningNormalizer())
    assert len(experience.policy) == len(experience.critic) == len(scored) - excluded
    assert experience.metrics["data/excluded"] == excluded
    scores = [row["score"] for row in experience.samples]
    assert sum(score is None for score in scores) == excluded
    # The table says why, and the log of which row.
    assert all(bool(row["excluded"]) == (row["score"] is None) for row in experience.samples)
    if kept:
        said = "reward function reward_functions:lenient gave no finite score"
        assert all(row["excluded"].startswith(said) for row in experience.samples if row["excluded"])
    if excluded:
        assert f"{prompts[trajectories[0].uid].source} (sample {trajectories[0].uid}/0, " in caplog.text
    assert all(math.isfinite(score) for score in scores if score is not None)
    # What is excluded weighs nothing in the means either.
    assert experience.metrics["rewards/lenient/mean"] == 1.0
