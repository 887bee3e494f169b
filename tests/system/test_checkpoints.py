"""Trainer checkpoints and exported model folders, written and read by real DeepSpeed ranks."""

import itertools
import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.driver.checkpoint import CheckpointStore
from rlhf_ray.errors import CheckpointError
from rlhf_ray.models.reading import SequenceScores, TokenLogprobs
from rlhf_ray.models.saving import ModelCard, is_complete
from rlhf_ray.packing import Sequence
from rlhf_ray.training.objectives import LanguageModeling, PreferenceReward
from rlhf_ray.training.state import MOMENTS, Fragment, SavedState

pytestmark = pytest.mark.system


def sequences(count: int, seed: int) -> list[Sequence]:
    """Random sequences of 4 to 15 tokens; pairs of weight 1 where an objective takes pairs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 16, (count,), generator=generator).tolist()
    return [
        Sequence(
            torch.randint(5, 320, (length,), generator=generator),
            torch.arange(length) > 1,
            fields={"weight": 1.0, "margin": 0.0},
        )
        for length in lengths
    ]


# Dropout makes the scalar model's next step depend on the random state as well.
CASES = {
    "causal": (LanguageModeling(), {}, None),
    "scalar": (PreferenceReward(), {"dropout": 0.3}, [0, 0, 1, 1, 2, 2, 3, 3]),
}


def step(group, head: str, seed: int) -> dict[str, float]:
    objective, _, pairs = CASES[head]
    return group.step(sequences(8, seed), objective, pairs).result()


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("causal", {"zero_stage": 0}),
        ("causal", {"zero_stage": 1}),
        ("scalar", {"zero_stage": 1}),
        ("causal", {"zero_stage": 3}),
        ("scalar", {"zero_stage": 3}),
        ("causal", {"zero_stage": 2, "dtype": "bf16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_resumed_trainer_goes_on_bit_for_bit(ranks, make_spec, tmp_path, head, options):
    two = ranks(2)
    spec = make_spec(head, **options, **CASES[head][1], schedule="cosine", warmup_steps=1, total_steps=4)
    group = two.build(spec)
    for seed in (0, 1):
        step(group, head, seed)
    group.save(str(tmp_path)).result()
    metrics = [step(group, head, seed) for seed in (2, 3)]
    weights = two.weights()

    group = two.build(spec)
    # Without the checkpoint the same steps come out differently.
    assert step(group, head, 2) != metrics[0]
    group = two.build(spec)
    group.load(str(tmp_path)).result()
    assert [step(group, head, seed) for seed in (2, 3)] == metrics
    resumed = two.weights()
    assert resumed.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(resumed[name], weights[name])] == []


@pytest.fixture(scope="module")
def saved(ranks, make_spec, tmp_path_factory) -> Path:
    """A checkpoint of two ranks at ZeRO 1."""
    folder = tmp_path_factory.mktemp("saved")
    group = ranks(2).build(make_spec())
    step(group, "causal", 0)
    group.save(str(folder)).result()
    return folder


def refused(ranks, spec, num_ranks: int, folder: Path) -> str:
    """The message of the error, which leaves the trainer as it was."""
    chosen = ranks(num_ranks)
    group = chosen.build(spec)
    before = chosen.weights()
    with pytest.raises(CheckpointError) as error:
        group.load(str(folder)).result()
    after = chosen.weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    return str(error.value)


SCHEDULE = {"schedule": "cosine", "warmup_steps": 1, "total_steps": 5}


def state_in(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Everything that a checkpoint holds, by part and parameter, whole."""
    shapes = json.loads((folder / "trainer.json").read_text())["parameters"]
    state = {}
    with ExitStack() as stack:
        saved = SavedState(folder, stack)
        for part, (name, shape) in itertools.product(("master", *MOMENTS), shapes.items()):
            state[part, name] = torch.full((math.prod(shape),), torch.nan)
            saved.read(part, Fragment(name, 0, 0, 0, math.prod(shape)), state[part, name])
    return state


@pytest.fixture(
    scope="module", params=[(1, 0), (2, 1), (4, 3)], ids=["1-rank-zero-0", "2-ranks-zero-1", "4-ranks-zero-3"]
)
def written(ranks, make_spec, tmp_path_factory, request) -> tuple[Path, list[dict[str, Tensor]], list[float]]:
    """A checkpoint after two steps; the weights then and two steps later; the learning rates of those."""
    num_ranks, zero_stage = request.param
    folder = tmp_path_factory.mktemp("written")
    group = ranks(num_ranks).build(make_spec(zero_stage=zero_stage, **SCHEDULE))
    for seed in (0, 1):
        step(group, "causal", seed)
    group.save(str(folder)).result()
    weights = [ranks(num_ranks).weights()]
    rates = [step(group, "causal", seed)["learning_rate"] for seed in (2, 3)]
    return folder, [*weights, ranks(num_ranks).weights()], rates


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        (1, {"zero_stage": 1}),
        (2, {"zero_stage": 2, "offload_optimizer": True}),
        (4, {"zero_stage": 0}),
        (2, {"zero_stage": 3}),
        (2, {"zero_stage": 0, "dtype": "bf16"}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_checkpoint_continues_at_other_numbers_of_ranks_and_stages(
    ranks, make_spec, written, tmp_path, num_ranks, options
):
    folder, (before, after), rates = written
    group = ranks(num_ranks).build(make_spec(**options, **SCHEDULE))
    group.load(str(folder)).result()
    for name, weight in ranks(num_ranks).weights().items():
        assert torch.equal(weight, before[name].to(weight.dtype)), name

    group.save(str(tmp_path)).result()
    expected, found = state_in(folder), state_in(tmp_path)
    assert expected.keys() == found.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []

    assert [step(group, "causal", seed)["learning_rate"] for seed in (2, 3)] == rates
    tolerance = 2e-2 if options.get("dtype") == "bf16" else 1e-5
    for name, weight in ranks(num_ranks).weights().items():
        torch.testing.assert_close(weight.float(), after[name], rtol=tolerance, atol=tolerance)


def test_checkpoint_from_before_the_first_step(ranks, make_spec, tmp_path):
    """A policy's while its critic warms up: there are no moments yet."""
    ranks(2).build(make_spec(zero_stage=1)).save(str(tmp_path)).result()
    untouched = ranks(1).build(make_spec(zero_stage=0))
    expected = step(untouched, "causal", 0)
    group = ranks(1).build(make_spec(zero_stage=0))
    group.load(str(tmp_path)).result()
    assert step(group, "causal", 0) == expected


def test_a_part_that_is_missing_is_seen(ranks, make_spec, saved, tmp_path):
    """The file of one rank, which the manifest of the whole checkpoint would miss as well."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "state_00001.safetensors").unlink()
    group = ranks(1).build(make_spec())
    with pytest.raises(CheckpointError, match=r"elements of .* are in no file of the checkpoint"):
        group.load(str(tmp_path)).result()


def test_checkpoint_of_another_architecture_is_refused(ranks, make_spec, models, saved):
    message = refused(ranks, make_spec(model="wide"), 2, saved)
    assert message == (
        f"test: the checkpoint {saved} does not fit {models['wide']}: 20 parameters differ, such as "
        "model.embed_tokens.weight, of shape [320, 64] there and [320, 128] here. Resume with the model it was "
        "written for, or use another run.dir"
    )
    message = refused(ranks, make_spec("scalar"), 2, saved)
    assert "1 parameters differ, such as score.weight, of shape None there and [1, 64] here" in message


def test_folder_without_a_checkpoint_is_refused(ranks, make_spec, tmp_path):
    assert f"no trainer state in the checkpoint {tmp_path}" in refused(ranks, make_spec(), 1, tmp_path)


def test_damage_to_a_real_checkpoint_is_seen(saved, tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    for number in (1, 2):
        shutil.copytree(saved, store.prepare(number) / "trainer")
        store.seal(number, {"number": number})
    optimizer = next((tmp_path / "step_000002").rglob("state_*.safetensors"))
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    assert store.latest().state == {"number": 1}


@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(1, 0), (2, 3)])
def test_exported_language_model_gives_transformers_the_trainers_logprobs(
    ranks, make_spec, models, tmp_path, num_ranks, zero_stage
):
    group = ranks(num_ranks).build(make_spec(zero_stage=zero_stage))
    step(group, "causal", 0)
    batch = sequences(5, seed=9)
    expected = group.forward(batch, TokenLogprobs()).result()
    folder = tmp_path / "model"
    group.export(str(folder), models["causal"], ModelCard("test", "SFT")).result()

    assert is_complete(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for sequence, logprobs in zip(batch, expected, strict=True):
        with torch.no_grad():
            logits = model(sequence.input_ids[None]).logits[0]
        found = logits.log_softmax(-1)[:-1].gather(-1, sequence.input_ids[1:, None]).squeeze(-1)
        torch.testing.assert_close(found[sequence.loss_mask[1:]], logprobs, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "quick"}], tokenize=False) == (
        "<|user|>quick<|end|>"
    )


@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(1, 0), (2, 3)])
def test_exported_reward_model_gives_transformers_the_trainers_scores(
    ranks, make_spec, models, tmp_path, num_ranks, zero_stage
):
    group = ranks(num_ranks).build(make_spec("scalar", zero_stage=zero_stage))
    step(group, "scalar", 0)
    batch = sequences(5, seed=9)
    expected = group.forward(batch, SequenceScores()).result()
    folder = tmp_path / "model"
    constants = {"score_mean": 0.25, "score_std": 2.0}
    group.export(str(folder), models["scalar"], ModelCard("test", "Reward modeling"), constants).result()

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (model.config.num_labels, model.config.score_mean, model.config.score_std) == (1, 0.25, 2.0)
    for sequence, score in zip(batch, expected, strict=True):
        with torch.no_grad():
            found = model(sequence.input_ids[None]).logits[0]
        torch.testing.assert_close(found, score, rtol=1e-5, atol=1e-5)
