"""Packed forward passes against transformers' own, one sequence at a time."""

import itertools

import pytest
import torch
from tiny_models import make_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from rlhf_ray.errors import ModelError
from rlhf_ray.models.architectures import SUPPORTED, context_length
from rlhf_ray.models.attention import packed_sdpa, register
from rlhf_ray.models.loading import load_causal_lm, load_scalar
from rlhf_ray.models.logprobs import token_logprobs
from rlhf_ray.models.packed import PackedCausalLM, PackedScalarModel
from rlhf_ray.packing import PackedBatch, Sequence, pack

VOCAB = 96
LENGTHS = (7, 1, 12, 5)

# What each architecture needs besides the common fields; windows are shorter than the longest sequence.
ARCHITECTURES = {
    "cohere": {"logit_scale": 0.25},
    "gemma": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
    },
    "gemma3_text": {"head_dim": 32, "sliding_window": 4, "num_hidden_layers": 7},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "olmo2": {},
    "phi": {},
    "phi3": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "smollm3": {},
    "starcoder2": {"sliding_window": 4},
}
WITHOUT_SCALAR_CLASS = ("cohere", "granite")


def tiny_config(model_type: str, **overrides):
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1 if model_type not in ("gpt2", "gpt_neox") else 2,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **ARCHITECTURES[model_type],
        **overrides,
    }
    return AutoConfig.for_model(model_type, **fields)


def batch_of(lengths=LENGTHS, seed=0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        mask = torch.rand(length, generator=generator) < 0.7
        mask[0] = False
        sequences.append(Sequence(ids, mask))
    return pack(sequences, list(range(len(lengths))))


def rows_of(batch: PackedBatch) -> list[torch.Tensor]:
    return list(batch.input_ids.split(batch.cu_seqlens.diff().tolist()))


def separate_logprobs(model, batch: PackedBatch, temperature=1.0) -> torch.Tensor:
    """log p(token | before) at the batch's targets from transformers' own forward, each sequence alone."""
    pieces = []
    for ids in rows_of(batch):
        distribution = (model(ids[None], use_cache=False).logits[0].float() / temperature).log_softmax(-1)
        pieces.append(torch.cat([torch.zeros(1), distribution[:-1].gather(-1, ids[1:, None]).squeeze(-1)]))
    return torch.cat(pieces)[batch.target_index]


def inputs_of(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.input_ids, batch.position_ids, batch.cu_seqlens


@pytest.fixture
def model_folder(tmp_path):
    def write(model_type: str, scalar: bool = False, **overrides) -> str:
        torch.manual_seed(0)
        config = tiny_config(model_type, **overrides)
        auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        if scalar:
            config.num_labels = 1
        auto.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return write


def test_every_supported_architecture_is_tested():
    assert set(ARCHITECTURES) == set(SUPPORTED)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_context_length_is_known(model_type):
    assert context_length(tiny_config(model_type)) == 64


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_packed_logprobs_and_gradients_equal_those_of_separate_sequences(model_type, model_folder):
    folder = model_folder(model_type)
    packed = load_causal_lm(folder, "fp32")
    # Attention of transformers' own reference implementation: plain matrix products and masks.
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    batch = batch_of()
    weights = torch.linspace(-1.0, 1.0, batch.num_targets)

    logprobs, entropy = packed.eval()(*inputs_of(batch), batch.target_index, temperature=0.7)
    expected = separate_logprobs(own, batch, temperature=0.7)
    assert entropy is None
    assert logprobs.dtype == torch.float32
    # Logits that spread over more than a nat: a wrong position or mask could not pass unseen.
    assert expected.std() > 0.1
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)

    (logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    expected_gradients = {name: p.grad for name, p in own.named_parameters()}
    for name, parameter in packed.transformers_parameters():
        torch.testing.assert_close(
            parameter.grad, expected_gradients[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("model_type", sorted(set(SUPPORTED) - set(WITHOUT_SCALAR_CLASS)))
def test_packed_scalar_equals_transformers_pooled_forward(model_type, model_folder):
    folder = model_folder(model_type, scalar=True)
    packed = load_scalar(folder, "fp32").eval()
    own = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    batch = batch_of()
    values = packed(*inputs_of(batch), batch.cu_seqlens[1:].long() - 1)
    expected = torch.stack([own(ids[None]).logits[0, 0] for ids in rows_of(batch)])
    assert values.dtype == torch.float32
    assert expected.std() > 0.1
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", WITHOUT_SCALAR_CLASS)
def test_scalar_model_of_architecture_without_a_class_is_refused(model_type, model_folder):
    with pytest.raises(ModelError, match=f"'{model_type}'.*no sequence classification model"):
        load_scalar(model_folder(model_type), "fp32")


@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_of_a_sequence_is_bit_equal_whatever_its_neighbours(sliding_window, softcap):
    torch.manual_seed(0)
    lengths = [3, 9, 1, 17]
    query, key, value = (torch.randn(1, heads, sum(lengths), 32) for heads in (4, 2, 2))
    options = {"sliding_window": sliding_window, "softcap": softcap, "scaling": 0.3}
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    together, _ = packed_sdpa(torch.nn.Module(), query, key, value, None, sequence_bounds=bounds, **options)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone, _ = packed_sdpa(
            torch.nn.Module(),
            query[:, :, rows],
            key[:, :, rows],
            value[:, :, rows],
            None,
            sequence_bounds=torch.tensor([0, length]),
            **options,
        )
        assert torch.equal(together[:, rows], alone)
        start += length


def test_attention_refuses_what_it_does_not_compute():
    x, bounds = torch.randn(1, 2, 4, 32), torch.tensor([0, 4])
    with pytest.raises(ModelError, match="s_aux"):
        packed_sdpa(torch.nn.Module(), x, x, x, None, sequence_bounds=bounds, s_aux=torch.zeros(2))
    with pytest.raises(ModelError, match="an attention mask"):
        packed_sdpa(torch.nn.Module(), x, x, x, torch.ones(4, 4), sequence_bounds=bounds)
    with pytest.raises(ModelError, match="no bounds of sequences"):
        packed_sdpa(torch.nn.Module(), x, x, x, None)


def test_registering_twice_changes_nothing():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    register()
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    register()
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == before
    assert before["packed_sdpa"] is packed_sdpa
    assert before["flash_attention_2"]._torchdynamo_disable


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_the_layers_of_every_architecture_are_found_to_be_compiled(model_type, model_folder):
    model = load_causal_lm(model_folder(model_type), "fp32")
    names = [name for name, _ in model.named_parameters()]
    model.compile_layers()
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    assert len(compiled) == model.config.num_hidden_layers
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_change_neither_logprobs_nor_gradients_nor_values(tmp_path, checkpointing):
    plain, compiled = (load_causal_lm(make_llama(tmp_path / "causal"), "fp32").train() for _ in range(2))
    critic, compiled_critic = (load_scalar(make_llama(tmp_path / "scalar", scalar=True), "fp32") for _ in range(2))
    if checkpointing:
        compiled.enable_gradient_checkpointing()
    compiled.compile_layers()
    compiled_critic.compile_layers()
    # Another number of sequences, of tokens and a single one are the same graphs.
    for lengths, recompiled in ((LENGTHS, False), ((5, 20), True), ((17,), True)):
        with torch._dynamo.config.patch(error_on_recompile=recompiled):
            batch = batch_of(lengths)
            found, _ = compiled(*inputs_of(batch), batch.target_index)
            found.sum().backward()
            with torch.no_grad():
                values = compiled_critic.eval()(*inputs_of(batch), batch.last_index)
        expected, _ = plain(*inputs_of(batch), batch.target_index)
        expected.sum().backward()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, critic.eval()(*inputs_of(batch), batch.last_index), atol=1e-5, rtol=1e-5)
    for (name, one), other in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_gradient_checkpointing_changes_neither_logprobs_nor_gradients(tmp_path):
    folder = make_llama(tmp_path / "model")
    batch = batch_of()
    results = []
    for checkpointing in (False, True):
        model = load_causal_lm(folder, "fp32").train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        logprobs, _ = model(*inputs_of(batch), batch.target_index)
        logprobs.sum().backward()
        results.append((logprobs, [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_empty_target_index_gives_every_parameter_a_zero_gradient(tmp_path, tie, checkpointing):
    model = load_causal_lm(make_llama(tmp_path / "model", tie=tie), "fp32").train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    nothing = torch.empty(0, dtype=torch.int64)
    logprobs, entropy = model(*inputs_of(batch_of((1,))), nothing, with_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_empty_read_index_gives_every_parameter_a_zero_gradient(tmp_path):
    model = load_scalar(make_llama(tmp_path / "model"), "fp32").train()
    values = model(*inputs_of(batch_of((1,))), torch.empty(0, dtype=torch.int64))
    assert values.shape == (0,)
    values.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_scalar_head_computes_in_float32_under_bf16_weights(tmp_path):
    model: PackedScalarModel = load_scalar(make_llama(tmp_path / "model"), "bf16").eval()
    batch = batch_of()
    read = batch.cu_seqlens[1:].long() - 1
    hidden = model._hidden_states(*inputs_of(batch))
    assert hidden.dtype == model.model.score.weight.dtype == torch.bfloat16
    expected = hidden[read].double() @ model.model.score.weight[0].double()
    values = model(*inputs_of(batch), read)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, atol=1e-6, rtol=1e-6)


def test_scalar_dropout_acts_in_training_mode_alone(tmp_path):
    folder = make_llama(tmp_path / "model")
    batch = batch_of()
    read = batch.cu_seqlens[1:].long() - 1
    plain, dropping = load_scalar(folder, "fp32"), load_scalar(folder, "fp32", dropout=0.5)
    expected = plain.train()(*inputs_of(batch), read)
    assert torch.equal(dropping.eval()(*inputs_of(batch), read), expected)
    torch.manual_seed(0)
    first, second = (dropping.train()(*inputs_of(batch), read) for _ in range(2))
    assert not torch.equal(first, expected)
    assert not torch.equal(first, second)


def test_parameters_carry_transformers_names(tmp_path):
    folder = make_llama(tmp_path / "model", tie=False)
    model: PackedCausalLM = load_causal_lm(folder, "fp32")
    names = [name for name, _ in model.transformers_parameters()]
    assert names == list(dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(names)


@pytest.mark.parametrize("targets", [0, 1, 39])
def test_every_module_is_called_once_whatever_the_number_of_targets(tmp_path, monkeypatch, targets):
    # Under ZeRO-3 a call of a module is a collective, so ranks with unequal work must make equal calls.
    monkeypatch.setitem(token_logprobs.__kwdefaults__, "chunk", 4)
    monkeypatch.setattr("rlhf_ray.models.packed.kept_tokens", lambda *_: 4)
    model = load_causal_lm(make_llama(tmp_path / "model", tie=False), "fp32")
    calls = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    logprobs, _ = model(*inputs_of(batch_of((40,))), torch.arange(1, targets + 1))
    logprobs.sum().backward()
    assert len(calls) == len(set(calls))
    assert "model.lm_head" in calls
