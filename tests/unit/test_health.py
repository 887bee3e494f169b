"""Updates that were skipped, weights that stand still, engines that differ from the trainer."""

import json
import math

import pytest
import torch
from safetensors import SafetensorError

from rlhf_ray.algorithms.checks import noting_nonfinite, require_finite
from rlhf_ray.driver.health import MOST_UNCHANGED, UpdateHealth, mismatch_alarm
from rlhf_ray.driver.ppo import _over_updates
from rlhf_ray.errors import BudgetExhausted, EngineError
from rlhf_ray.packing import Sequence
from rlhf_ray.training import replay
from rlhf_ray.training.objectives import LanguageModeling, PolicyUpdate
from rlhf_ray.training.replay import load_batch, save_batch
from rlhf_ray.training.trainer import ParameterSample


def metrics(*, skipped: bool = False, unchanged: int = 0) -> dict[str, float]:
    loss = math.nan if skipped else 1.0
    return {"loss": loss, "grad_norm": loss, "skipped_updates": float(skipped), "unchanged_updates": float(unchanged)}


def batch(advantage: float = 0.5) -> list[Sequence]:
    """Sequences of two and three tokens."""
    return [
        Sequence(
            torch.arange(length),
            torch.arange(length) > 0,
            {"advantages": torch.full((length,), advantage)},
            {"ptx": 0.0, "weight": 1 / length},
        )
        for length in (2, 3)
    ]


def test_a_batch_comes_back_as_it_was_saved(tmp_path):
    objective = PolicyUpdate(0.2, 0.7, one_step=True)
    save_batch(tmp_path / "batch", batch(), [7, 8], objective, {"loss": 1.5, "grad_norm": math.inf})
    sequences, group = load_batch(tmp_path / "batch")
    assert group == [7, 8]
    for found, expected in zip(sequences, batch(), strict=True):
        assert torch.equal(found.input_ids, expected.input_ids)
        assert torch.equal(found.loss_mask, expected.loss_mask)
        assert torch.equal(found.token_fields["advantages"], expected.token_fields["advantages"])
        assert found.fields == expected.fields
    about = json.loads((tmp_path / "batch" / "about.json").read_text())
    assert about["objective"]["name"] == "PolicyUpdate"
    assert (about["objective"]["clip_range"], about["objective"]["temperature"]) == (0.2, 0.7)
    assert (about["metrics"], about["not_finite"]) == ({"loss": 1.5, "grad_norm": "inf"}, {})
    save_batch(tmp_path / "bare", batch(), None, LanguageModeling(), {})
    assert load_batch(tmp_path / "bare")[1] is None


def test_three_skipped_updates_in_a_row_end_the_run_with_their_batch(tmp_path):
    health = UpdateHealth(tmp_path, "policy")
    for step, skipped in enumerate([True, True, False, True, True]):
        health.check(step, metrics(skipped=skipped), batch(), LanguageModeling(), None)
    with pytest.raises(BudgetExhausted) as error:
        health.check(5, metrics(skipped=True), batch(math.inf), LanguageModeling(), None)
    folder = tmp_path / "bad_batches" / "policy_000005"
    assert str(error.value) == (
        "policy trainer: 3 updates in a row were skipped, because loss or gradient was not finite (the last loss nan, "
        "gradient norm nan); the weights are those of the last update that was taken. The last batch is saved in "
        f"{folder}, to be read by rlhf_ray.training.replay.load_batch; not finite in it: advantages (5). "
        "Lower the learning rate or max_grad_norm, or look for broken data; the same command continues from the newest "
        "checkpoint"
    )
    assert [len(one) for one in load_batch(folder)[0]] == [2, 3]


def test_a_batch_that_cannot_be_saved_does_not_hide_why_the_run_ends(tmp_path, monkeypatch):
    (tmp_path / "bad_batches").write_text("a file where the folder should be")
    health = UpdateHealth(tmp_path, "policy")
    for step in (3, 4):
        health.check(step, metrics(skipped=True), batch(math.inf), LanguageModeling(), None)
    said = r"3 updates in a row were skipped.*The last batch could not be saved in .*policy_000005: "
    with pytest.raises(BudgetExhausted, match=said):
        health.check(5, metrics(skipped=True), batch(math.inf), LanguageModeling(), None)
    (tmp_path / "bad_batches").unlink()

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(replay, "save_file", full)
    with pytest.raises(BudgetExhausted, match=f"{said}No space left"):
        health.check(5, metrics(skipped=True), batch(math.inf), LanguageModeling(), None)


def test_weights_that_stand_still_raise_one_alarm(tmp_path, caplog):
    health = UpdateHealth(tmp_path, "critic")
    for unchanged in range(MOST_UNCHANGED + 5):
        health.check(unchanged, metrics(unchanged=unchanged), batch(), LanguageModeling(), None)
    assert caplog.text.count("critic: 10 updates in a row have left every parameter as it was") == 1


@pytest.mark.parametrize(
    ("difference", "dtypes", "alarm"),
    [
        (9e-4, {"fp32"}, 0.0),
        (2e-3, {"fp32"}, 1.0),
        (2e-3, {"fp32", "bf16"}, 0.0),
        (0.06, {"bf16"}, 1.0),
        (math.nan, {"bf16"}, 1.0),
    ],
)
def test_engine_and_trainer_may_differ_by_rounding(caplog, difference, dtypes, alarm):
    found = mismatch_alarm({"sampling/sampling_logp_difference/mean": difference}, dtypes)
    assert found == {"sampling/sampling_logp_difference/alarm": alarm}
    assert ("log-probabilities of engine and trainer differ" in caplog.text) == bool(alarm)


def test_a_sample_sees_the_change_of_any_parameter():
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 1))
    sample = ParameterSample(model)
    assert not sample.changed()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(1.001)
        assert sample.changed()
        assert not sample.changed()


def test_an_iteration_has_the_mean_of_its_updates_but_the_count_of_what_is_counted():
    updates = [
        {"val/ratio": 1.0, "skipped_updates/policy": 1.0, "unchanged_updates/policy": 4.0},
        {"val/ratio": 3.0, "skipped_updates/policy": 1.0, "unchanged_updates/policy": 0.0},
    ]
    assert _over_updates(updates) == {
        "val/ratio": 2.0,
        "skipped_updates/policy": 2.0,
        "unchanged_updates/policy": 0.0,
    }


def test_numbers_that_are_not_finite_are_noted_where_somebody_notes_them():
    with noting_nonfinite() as noted:
        require_finite(ratio=torch.tensor([1.0, math.inf]), values=torch.ones(2))
    assert [note.partition(",")[0] for note in noted] == ["ratio must be finite"]
    with pytest.raises(EngineError, match="ratio must be finite"):
        require_finite(ratio=torch.tensor([math.inf]))
