"""Loading: what is accepted, what is refused and in which words."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CHAT_TEMPLATE, make_llama, make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from rlhf_ray.config.sections import ModelSection
from rlhf_ray.errors import ModelError
from rlhf_ray.models.loading import (
    check_same_vocabulary,
    check_tokenizer_fits,
    describe_model,
    load_causal_lm,
    load_config,
    load_scalar,
    load_tokenizer,
)
from rlhf_ray.stages.models import prepare_tokenizer


def edit_config(folder: str, **fields) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tokenizer(folder: str, **fields) -> None:
    path = Path(folder) / "tokenizer_config.json"
    values = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@pytest.fixture
def folder(tmp_path) -> str:
    return make_llama(tmp_path / "model", tie=False)


@pytest.mark.parametrize("load", [load_tokenizer, load_config, lambda p: load_causal_lm(p, "fp32")])
def test_missing_folder_is_named_without_asking_the_hub(load, tmp_path):
    with pytest.raises(ModelError, match="no_such_model does not exist"):
        load(str(tmp_path / "no_such_model"))


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no tokenizer_config"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_keeps_its_template_and_tokens(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")


def test_tokenizer_without_end_of_sequence_is_refused(folder):
    edit_tokenizer(folder, eos_token=None)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(folder)


def test_missing_padding_token_is_taken_from_the_tokenizers_own_tokens(folder, caplog):
    edit_tokenizer(folder, pad_token=None)
    assert load_tokenizer(folder).pad_token == "<|pad|>"
    assert "no padding token" in caplog.text


def test_tokenizer_without_any_padding_token_pads_with_its_end(tmp_path):
    folder = tmp_path / "model"
    make_llama(folder)
    text = (folder / "tokenizer.json").read_text().replace("<|pad|>", "<|x|>")
    (folder / "tokenizer.json").write_text(text)
    edit_tokenizer(str(folder), pad_token=None)
    assert load_tokenizer(str(folder)).pad_token == "<|end|>"


def test_unsupported_architecture_is_refused_by_name(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"type 'bert', which cannot be trained here.*llama"):
        load_causal_lm(str(tmp_path / "bert"), "fp32")


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_embedding_that_depends_on_the_batch_is_refused(folder, rope_type):
    factors = {"factor": 2.0, "long_factor": [1.0] * 16, "short_factor": [1.0] * 16}
    edit_config(folder, rope_parameters={"rope_type": rope_type, "rope_theta": 1e4, **factors})
    with pytest.raises(ModelError, match=f"rotary embeddings of type '{rope_type}'"):
        load_causal_lm(folder, "fp32")


def test_reward_model_is_refused_as_a_policy_with_both_names(tmp_path):
    folder = make_llama(tmp_path / "reward", scalar=True)
    with pytest.raises(ModelError, match="holds a LlamaForSequenceClassification, but a LlamaForCausalLM"):
        load_causal_lm(folder, "fp32")


def test_head_with_several_labels_is_refused(tmp_path):
    folder = make_llama(tmp_path / "reward", scalar=True)
    edit_config(folder, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ModelError, match="has 2 labels"):
        load_scalar(folder, "fp32")


def test_weights_of_another_architecture_are_refused(folder, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").rename(Path(folder) / "model.safetensors")
    with pytest.raises(ModelError, match=r"not those of a LlamaForCausalLM.*such as lm_head.*transformer\.h\.0"):
        load_causal_lm(folder, "fp32")
    with pytest.raises(ModelError, match=r"not those of a LlamaForSequenceClassification.*transformer\.h\.0"):
        load_scalar(folder, "fp32")


def test_weights_of_another_shape_are_refused(folder):
    edit_config(folder, intermediate_size=96)
    with pytest.raises(ModelError, match="could not be loaded"):
        load_causal_lm(folder, "fp32")


def test_missing_weight_is_named(folder):
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 parameters are missing, such as model\.norm\.weight"):
        load_causal_lm(folder, "fp32")


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_take_the_dtype_asked_for(folder, name, dtype):
    assert {p.dtype for p in load_causal_lm(folder, name).parameters()} == {dtype}
    assert {p.dtype for p in load_scalar(folder, name).parameters()} == {dtype}


def test_policy_has_no_dropout_whatever_its_configuration_says(tmp_path):
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=1, n_positions=16)
    assert config.resid_pdrop == config.attn_pdrop == config.embd_pdrop == 0.1
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = load_causal_lm(str(tmp_path / "gpt2"), "fp32").train()
    inputs = (torch.arange(8), torch.arange(8), torch.tensor([0, 8], dtype=torch.int32), torch.arange(1, 8))
    assert torch.equal(model(*inputs)[0], model(*inputs)[0])


def test_new_scalar_head_depends_on_the_seed_alone(folder):
    torch.manual_seed(1)
    first = load_scalar(folder, "fp32", seed=5)
    torch.manual_seed(2)
    again, other = load_scalar(folder, "fp32", seed=5), load_scalar(folder, "fp32", seed=6)
    assert torch.equal(first.model.score.weight, again.model.score.weight)
    assert not torch.equal(first.model.score.weight, other.model.score.weight)
    # 64 draws of standard deviation 1/sqrt(65) = 0.124.
    assert 0.08 < first.model.score.weight.std() < 0.17
    body = AutoModelForCausalLM.from_pretrained(folder).model.state_dict()
    assert all(torch.equal(body[name], p) for name, p in first.model.model.state_dict().items())


def test_reward_models_own_head_is_kept(tmp_path):
    folder = make_llama(tmp_path / "reward", scalar=True)
    saved = load_file(Path(folder) / "model.safetensors")["score.weight"]
    assert torch.equal(load_scalar(folder, "fp32", seed=9).model.score.weight, saved)


def test_vocabularies_that_differ_are_refused():
    a, b = make_tokenizer(), make_tokenizer(texts=["something else entirely"])
    names = ("policy", "reward model")
    check_same_vocabulary(a, make_tokenizer(), names=names)
    with pytest.raises(ModelError, match="policy and the reward model do not share a vocabulary"):
        check_same_vocabulary(a, b, names=names)
    c = make_tokenizer()
    c.eos_token = "<|pad|>"
    with pytest.raises(ModelError, match=r"policy ends a sequence with '<\|end\|>'.*'<\|pad\|>'"):
        check_same_vocabulary(a, c, names=names)


def test_tokenizer_larger_than_the_embedding_is_refused(folder):
    tokenizer, config = load_tokenizer(folder), AutoConfig.from_pretrained(folder)
    config.vocab_size = len(tokenizer)
    check_tokenizer_fits(config, tokenizer)
    config.vocab_size = len(tokenizer) - 1
    with pytest.raises(ModelError, match=f"token ids up to {len(tokenizer) - 1}.*embeddings for"):
        check_tokenizer_fits(config, tokenizer)


@pytest.mark.parametrize("tie", [True, False])
def test_description_needs_no_weights_and_counts_parameters(tmp_path, tie):
    folder = make_llama(tmp_path / "model", tie=tie)
    expected = sum(p.numel() for p in load_causal_lm(folder, "fp32").parameters())
    (Path(folder) / "model.safetensors").unlink()
    assert describe_model(folder) == {
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "parameters": expected,
        "dtype": "float32",
        "context_length": 256,
        "vocab_size": 320,
        "hidden_size": 64,
        "num_layers": 2,
    }


def test_reward_model_is_described_with_its_head(tmp_path):
    facts = describe_model(make_llama(tmp_path / "reward", scalar=True))
    assert facts["architecture"] == "LlamaForSequenceClassification"


def test_flash_attention_that_cannot_run_here_is_refused_and_never_chosen(tmp_path):
    folder = make_llama(tmp_path)
    with pytest.raises(ModelError, match="needs bf16 and a GPU and the package flash-attn"):
        load_scalar(folder, "fp32", attention="flash_attention_2")
    with pytest.raises(ModelError, match=r"needs a GPU and the package flash-attn.*Set it to packed_sdpa, or to auto"):
        load_causal_lm(folder, "bf16", attention="flash_attention_2")
    for asked in ("auto", "packed_sdpa"):
        assert load_causal_lm(folder, "bf16", attention=asked).config._attn_implementation == "packed_sdpa"


def test_remote_code_is_off_unless_asked_for_and_named_in_the_log_where_it_is_on(tmp_path, caplog):
    folder = make_llama(tmp_path / "model")
    prepare_tokenizer(folder, ModelSection(path=folder), tmp_path)
    assert "trust_remote_code" not in caplog.text
    prepare_tokenizer(folder, ModelSection(path=folder, trust_remote_code=True), tmp_path)
    assert f"trust_remote_code is on: Python code that comes with {folder}" in caplog.text
