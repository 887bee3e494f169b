"""The options of PPO and whether it learns: short runs, one after the other on the same running groups."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from ppo_runs import TOLERANCE, Inputs, make_inputs, rows_of
from ray.util.placement_group import placement_group_table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.algorithms.kl import AdaptiveKL
from rlhf_ray.config import PPOConfig, from_dict
from rlhf_ray.data import prompt_items, read_rows
from rlhf_ray.driver import ppo
from rlhf_ray.driver.groups import Groups, running_groups
from rlhf_ray.driver.ledger import ledger_rows
from rlhf_ray.driver.ppo import PPOLoop
from rlhf_ray.driver.rollouts import set_aside
from rlhf_ray.driver.turns import Turns
from rlhf_ray.driver.verify import verify
from rlhf_ray.errors import BudgetExhausted, EngineError, RunStopped
from rlhf_ray.models.reading import StateValues
from rlhf_ray.packing import Sequence
from rlhf_ray.scoring import scorer
from rlhf_ray.scoring.scorer import check_share
from rlhf_ray.stages.ppo import read_ptx
from rlhf_ray.stages.run import open_run
from rlhf_ray.tracking.rundir import RunDirectory
from rlhf_ray.training.objectives import LanguageModeling
from rlhf_ray.training.replay import load_batch

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("ppo"))


@dataclass
class Shared:
    """Groups that several short runs use one after the other; the policy goes on from where the last run left it."""

    inputs: Inputs
    groups: Groups
    tokenizer: Any

    def config(self, name: str, **sections: dict[str, Any]) -> PPOConfig:
        return functions_only(self.inputs, name, **sections)

    def train(self, config: PPOConfig, *, stopped: bool = False) -> list[dict[str, Any]]:
        """Run PPO on the groups, or its first iteration if it is to be `stopped`; returns the metrics."""
        data = config.data
        prompts, _ = prompt_items(read_rows(data.path), self.tokenizer, data.max_tokens, data.overlong, data.as_chat)
        with open_run(config, "ppo") as run:
            if stopped:
                run._stop.set()  # as a signal would
            prompts, spares = set_aside(prompts, config.ppo.spare_prompts, config.run.seed)
            PPOLoop(config, run, self.groups, prompts, read_ptx(config, self.tokenizer), spares).train()
        return rows_of(config)

    def values(self) -> list[Tensor]:
        return self.groups.critic.forward(random_responses(), StateValues()).result()


def functions_only(inputs: Inputs, name: str, **sections: dict[str, Any]) -> PPOConfig:
    """No reward model: a function alone, and a critic from the policy."""
    sections["reward"] = {"models": [], "functions": [{"path": "reward_functions:low_tokens"}]} | sections.get(
        "reward", {}
    )
    sections["critic"] = {"init": "policy"} | sections.get("critic", {})
    sections["ppo"] = {"iterations": 2, "kl_coef": 0.0} | sections.get("ppo", {})
    return inputs.config(name, **sections)


def random_responses() -> list[Sequence]:
    ids = torch.randint(5, 300, (10, 20), generator=torch.Generator().manual_seed(0))
    return [Sequence(row, torch.arange(20) > 7) for row in ids]


@pytest.fixture(scope="module")
def shared(ray_cluster: None, inputs: Inputs) -> Iterator[Shared]:
    with sharing(inputs, functions_only(inputs, "shared", placement={"share": [["policy", "rollout"]]})) as shared:
        yield shared


@contextmanager
def sharing(inputs: Inputs, config: PPOConfig) -> Iterator[Shared]:
    tokenizer = AutoTokenizer.from_pretrained(inputs.policy)
    with ExitStack() as stack:
        directory = stack.enter_context(RunDirectory(config.run.dir))
        groups = stack.enter_context(running_groups(config, tokenizer, inputs.policy, directory.logs))
        yield Shared(inputs, groups, tokenizer)


def test_groups_that_share_on_a_cpu_sit_together_and_do_not_sleep(
    ray_cluster: None, shared: Shared, caplog: pytest.LogCaptureFixture
):
    config = functions_only(shared.inputs, "sharing", placement={"share": [["policy", "rollout"]]})
    # Other tests' groups may be there, too.
    held = [group["bundles"] for group in placement_group_table().values() if group["state"] == "CREATED"]
    assert [0.25, 0.25, 0.5, 1.0] in [sorted(bundle["CPU"] for bundle in bundles.values()) for bundles in held]
    with caplog.at_level("WARNING", logger="rlhf_ray.driver.turns"):
        Turns(config, {"policy": shared.groups.policy}, shared.groups.rollout)
    assert "rollout shares its place with policy; on a CPU engines do not sleep" in caplog.text
    assert not shared.groups.turns.taken


def test_a_critic_from_the_policy_is_a_linear_head_on_its_body(shared: Shared):
    """Before anything is trained. There are twice as many states as directions, so that no other body would fit."""
    values = torch.cat(shared.values())[:, None]

    def residual(model: Any) -> float:
        with torch.no_grad():
            states = [model.model(s.input_ids[None]).last_hidden_state[0, 7:] for s in random_responses()]
        hidden = torch.cat(states)
        assert len(hidden) == len(values) >= 2 * hidden.shape[1]
        fitted = hidden @ torch.linalg.lstsq(hidden, values).solution
        return float((fitted - values).std() / values.std())

    assert residual(AutoModelForCausalLM.from_pretrained(shared.inputs.policy)) < 1e-4
    assert residual(AutoModelForSequenceClassification.from_pretrained(shared.inputs.reward)) > 0.1


def test_critic_warm_up_trains_the_critic_alone(shared: Shared):
    """The first run on these groups: a policy that is not trained stays the reference."""
    values = shared.values()
    rows = shared.train(shared.config("warmup", critic={"warmup_iterations": 2}, ppo={"iterations": 3}))
    assert ["grad_norm/policy" in row for row in rows] == [False, False, True]
    for row in rows:
        assert abs(row["objective/kl"]) < TOLERANCE
        assert row["grad_norm/critic"] > 0
    assert all(not torch.equal(one, other) for one, other in zip(values, shared.values(), strict=True))


def test_several_epochs_and_minibatches_take_old_logprobs_from_the_trainer(shared: Shared):
    rows = shared.train(shared.config("epochs", ppo={"epochs": 2, "minibatches": 2}))
    for row in rows:
        # Computed before the updates, with the weights that sampled.
        assert row["sampling/sampling_logp_difference/max"] < TOLERANCE
        # Later steps train a policy that has moved away from the one that sampled.
        assert row["policy/approxkl_avg"] > 1e-6
        assert row["val/ratio"] != 1.0


def test_the_adaptive_coefficient_follows_the_measured_kl(shared: Shared):
    ppo = {"iterations": 3, "kl_coef": 0.1, "kl_target": 0.5, "kl_horizon": 100}
    rows = shared.train(shared.config("adaptive", ppo=ppo))
    controller = AdaptiveKL(0.1, 0.5, 100)
    for row in rows:
        assert row["objective/kl_coef"] == pytest.approx(controller.coef, rel=1e-6)
        penalty = controller.coef * row["objective/kl"]
        assert row["objective/non_score_reward"] == pytest.approx(-penalty, rel=1e-4, abs=1e-9)
        controller.update(row["objective/kl"], 16)
    assert len({row["objective/kl_coef"] for row in rows}) == 3


def test_the_entropy_bonus_raises_the_entropy(shared: Shared):
    rows = shared.train(shared.config("entropy", ppo={"iterations": 4, "entropy_coef": 100.0}))
    entropy = [row["policy/entropy_avg"] for row in rows]
    assert entropy[-1] > entropy[0] + 0.01
    assert 0 < entropy[0] < math.log(320)


def test_the_pretraining_mix_trains_on_the_demonstrations(shared: Shared):
    config = shared.config("ptx", ppo={"iterations": 3, "ptx_coef": 5.0, "ptx_path": shared.inputs.demonstrations})
    # An iteration has as many demonstrations as responses, 16: all that there are.
    demonstrations = [dataclasses.replace(s, fields={}) for s in read_ptx(config, shared.tokenizer)]
    expected = shared.groups.policy.evaluate(demonstrations, LanguageModeling()).result()["loss"]
    rows = shared.train(config)
    assert rows[0]["loss/ptx_avg"] == pytest.approx(expected, rel=1e-5)
    assert rows[-1]["loss/ptx_avg"] < rows[0]["loss/ptx_avg"] - 0.2


@pytest.fixture(scope="module")
def learned(shared: Shared) -> list[dict[str, Any]]:
    """Ten iterations of 64 responses and eight optimizer steps, with nothing but the function's reward."""
    ppo = {"iterations": 10, "prompts_per_iteration": 16, "epochs": 2, "minibatches": 4}
    rows = shared.train(shared.config("learning", rollout={"samples_per_prompt": 4}, ppo=ppo))
    shared.groups.policy.save(str(shared.inputs.folder / "learned")).result()
    return rows


def test_ppo_learns_what_the_reward_function_pays_for(learned: list[dict[str, Any]]):
    scores = [row["objective/scores"] for row in learned]
    assert sum(scores[:2]) / 2 < 0.6
    assert sum(scores[-3:]) / 3 > 0.75
    assert learned[-1]["objective/kl"] > learned[0]["objective/kl"]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_loss_leads_back_to_the_reference(shared: Shared, learned: list[dict[str, Any]], estimator: str):
    shared.groups.policy.load(str(shared.inputs.folder / "learned")).result()
    ppo = {"iterations": 7, "kl_placement": "loss", "kl_estimator": estimator, "kl_coef": 10.0, "minibatches": 4}
    rows = shared.train(shared.config(f"loss_{estimator}", ppo=ppo))
    for row in rows:
        assert row["objective/non_score_reward"] == 0.0
        assert row["objective/rlhf_reward"] == row["objective/scores"]
        assert row["loss/kl_avg"] > 0
    assert rows[-1]["objective/kl"] < 0.8 * rows[0]["objective/kl"]


@pytest.mark.parametrize(("bound", "minibatches"), [(1, 1), (2, 2)])
def test_sampling_ahead_of_training_keeps_to_the_bound(shared: Shared, bound: int, minibatches: int):
    ppo = {"iterations": 6, "max_staleness": bound, "minibatches": minibatches}
    config = shared.config(f"ahead_{bound}", rollout={"max_new_tokens": 60}, ppo=ppo)
    rows = shared.train(config)
    assert [row["sampling/staleness/max"] for row in rows[: bound + 1]] == list(range(bound + 1))
    assert all(row["sampling/staleness/max"] <= bound for row in rows)
    assert max(row["sampling/staleness/mean"] for row in rows) > 0.5
    # The first iteration trains what its own weights sampled.
    assert rows[0]["sampling/sampling_logp_difference/max"] < TOLERANCE
    assert rows[0]["sampling/importance_weight/mean"] == pytest.approx(1, abs=TOLERANCE)
    assert rows[-1]["sampling/sampling_logp_difference/max"] > TOLERANCE
    assert all(0.5 < row["sampling/importance_weight/mean"] < 2 for row in rows)
    assert [one.problem for one in verify(Path(config.run.dir)) if one.problem] == []


def test_a_run_that_samples_ahead_and_is_stopped_draws_what_it_had_begun_again(shared: Shared):
    config = shared.config("ahead_stopped", ppo={"iterations": 5, "max_staleness": 2})
    with pytest.raises(RunStopped):
        shared.train(config, stopped=True)
    assert [row["step"] for row in rows_of(config)] == [0]
    rows = shared.train(config)
    assert [row["step"] for row in rows] == list(range(5))
    # Batches that were begun before the stop are sampled again, with the weights of the checkpoint.
    assert [row["sampling/staleness/max"] for row in rows] == [0, 0, 1, 2, 2]
    findings = verify(Path(config.run.dir))
    assert [one.problem for one in findings if one.problem] == []
    assert "40 drawn of 20, each once an epoch" in [one.found for one in findings]
    # The one that was trained before the stop is not among them.
    ledger = [row for _, row in ledger_rows(Path(config.run.dir) / "ledger.jsonl")]
    again = next(index for index, row in enumerate(ledger) if row["event"] == "started" and row["iteration"] == 1)
    assert [(row["event"], row["iteration"]) for row in ledger[again + 1 : again + 4]] == [
        *(("abandoned", iteration) for iteration in (1, 2, 3)),
    ]
    assert sorted(row["iteration"] for row in ledger if row["event"] == "trained") == list(range(5))
    assert findings[-1].subject == "ledger" and "80 samples trained once each, 3 batches" in findings[-1].found


def test_updates_that_are_not_finite_end_the_run_with_their_batch(shared: Shared, monkeypatch: pytest.MonkeyPatch):
    build = ppo.build_experience

    def spoil(*arguments: Any) -> Any:
        experience = build(*arguments)
        experience.policy[0].token_fields["advantages"][-1] = math.nan
        return experience

    monkeypatch.setattr(ppo, "build_experience", spoil)
    config = shared.config("spoiled", ppo={"iterations": 5})
    with pytest.raises(EngineError, match=r"policy trainer: 3 updates in a row were skipped.*in it: advantages .1."):
        shared.train(config)
    rows = rows_of(config)
    assert [(row["skipped_updates/policy"], row["skipped_updates/critic"]) for row in rows] == [(1, 0), (1, 0)]
    # The engines went on with the weights from before.
    assert all(row["sampling/sampling_logp_difference/alarm"] == 0 for row in rows)
    sequences, _ = load_batch(Path(config.run.dir) / "bad_batches" / "policy_000002")
    assert len(sequences) == 16
    assert sum(int(one.token_fields["advantages"].isnan().sum()) for one in sequences) == 1


def test_a_run_that_loses_too_many_samples_ends_with_a_checkpoint_of_its_last_whole_iteration(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
):
    config = shared.config("exhausted", ppo={"iterations": 4})
    calls: list[int] = []

    def exhausted(item: Any, scores: list[float | None]) -> None:
        calls.append(len(scores))
        if len(calls) == 3:
            check_share(item, [None] * len(scores))

    monkeypatch.setattr(scorer, "check_share", exhausted)
    with pytest.raises(BudgetExhausted, match="scored 0 of the iteration's 16 responses") as ended:
        shared.train(config)
    assert ended.value.exit_code == 3
    assert [row["step"] for row in rows_of(config)] == [0, 1]
    assert [path.name for path in (Path(config.run.dir) / "checkpoints").iterdir()] == ["step_000002"]
    # Mended, or with another share, it goes on.
    values = config.model_dump(mode="json")
    values["reward"]["functions"][0]["min_scored"] = 0.5
    assert [row["step"] for row in shared.train(from_dict(values, "ppo"))] == list(range(4))
    assert [one.problem for one in verify(Path(config.run.dir)) if one.problem] == []


def test_prompts_set_aside_take_the_place_of_those_that_a_function_fails_on(ray_cluster: None, inputs: Inputs):
    reward = {"functions": [{"path": "reward_functions:scarce", "min_scored": 0.25}]}
    with sharing(inputs, functions_only(inputs, "scarce", reward=reward)) as shared:
        check_spares(shared, reward)


def check_spares(shared: Shared, reward: dict[str, Any]) -> None:
    rows = {}
    for name, staleness in (("spare", 0), ("spare-ahead", 1)):
        config = shared.config(
            name,
            reward=reward,
            rollout={"samples_per_prompt": 1},
            ppo={"iterations": 3, "prompts_per_iteration": 6, "spare_prompts": 6, "max_staleness": staleness},
        )
        metrics = shared.train(config)
        assert [one.problem for one in verify(Path(config.run.dir)) if one.problem] == []
        files = sorted((Path(config.run.dir) / "samples").glob("*.parquet"))
        rows[name] = [pq.read_table(file).to_pylist() for file in files]
        for metric, of_step in zip(metrics, rows[name], strict=True):
            trained = [row for row in of_step if row["score"] is not None]
            spares = [row["uid"] for row in of_step if "~" in row["uid"]]
            assert len(of_step) == 6 + len(spares)
            assert len(trained) == 6 or len(spares) == 6
            assert metric["data/excluded"] == len(of_step) - len(trained)
            assert sum(bool(row["excluded"]) for row in of_step) == len(of_step) - len(trained)
        # Some replace all that failed, and some spares fail, so that there is another round.
        assert any(0 < sum("~" in row["uid"] for row in of_step) < 6 for of_step in rows[name])
        assert any("~" in row["uid"] and row["score"] is None for of_step in rows[name] for row in of_step)
    # Which ones does not hang on the clock, which decides what is sampled first.
    uids = {name: [[row["uid"] for row in of_step] for of_step in of_run] for name, of_run in rows.items()}
    assert uids["spare"] == uids["spare-ahead"]
