"""Loading tokenizers and models, with errors that say what is wrong with a folder."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_ray.errors import ModelError
from rlhf_ray.models.architectures import (
    causal_class_name,
    check_supported,
    context_length,
    scalar_class_name,
)
from rlhf_ray.models.attention import AUTO, choose_attention, register
from rlhf_ray.models.packed import PackedCausalLM, PackedScalarModel
from rlhf_ray.models.quiet import quiet_transformers
from rlhf_ray.names import is_hub_name

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop")
_OTHER_DROPOUTS = (
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "residual_dropout",
    "classifier_dropout",
    "summary_first_dropout",
)


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub.

    A tokenizer without a padding token gets one: its own token whose name speaks of padding where there is
    one, else the end-of-sequence token. Nothing here pads; only the saved model folders of scalar models name
    the token.

    Args:
        path: A folder, or a hub name.
        trust_remote_code: Whether code that comes with the tokenizer may run.

    Raises:
        ModelError: No such folder or hub name, or no end-of-sequence token.
    """
    _check_local(path, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"No tokenizer could be loaded from {path}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of {path} has no end-of-sequence token, so a reply would never end. "
            "Set 'eos_token' in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        named = [t.content for t in tokenizer.added_tokens_decoder.values() if "pad" in t.content.lower()]
        tokenizer.pad_token = named[0] if named else tokenizer.eos_token
        logger.warning("The tokenizer of %s has no padding token; using %r.", path, tokenizer.pad_token)
    return tokenizer


def load_config(path: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load a model's configuration alone and check that the architecture is supported.

    Raises:
        ModelError: No such folder or hub name, or an architecture that cannot be packed.
    """
    _check_local(path, "config.json")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"No model configuration could be loaded from {path}: {_first_line(error)}") from error
    check_supported(config, path)
    return config


def load_causal_lm(path: str, dtype: str, *, trust_remote_code: bool = False, attention: str = AUTO) -> PackedCausalLM:
    """Load a causal language model, with every dropout of its configuration set to 0.

    Dropout would make the trainer's log-probabilities differ from those of the engine that sampled the
    tokens.

    Args:
        path: A folder, or a hub name.
        dtype: "fp32" or "bf16".
        trust_remote_code: Whether code that comes with the model may run.
        attention: As for `choose_attention`.

    Raises:
        ModelError: No such model, an unsupported architecture, a folder that holds another kind of model
            (such as a reward model), or weights that do not belong to the configuration.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    expected = causal_class_name(config)
    found = _saved_class(config, expected)
    if found != expected:
        raise ModelError(
            f"{path} holds a {found}, but a {expected} was asked for. "
            "Give the folder of a causal language model, not that of a reward model or of an encoder."
        )
    _set_dropout(config, attention=0.0)
    model, info = _from_pretrained(AutoModelForCausalLM, path, config, dtype, trust_remote_code, attention)
    _check_weights(path, expected, set(info["missing_keys"]), set(info["unexpected_keys"]))
    return PackedCausalLM(model)


def load_scalar(
    path: str,
    dtype: str,
    *,
    trust_remote_code: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    attention: str = AUTO,
) -> PackedScalarModel:
    """Load a reward model or critic.

    From a reward model's folder it takes the head saved there. From a causal language model's folder it makes
    a new head: weights from N(0, 1 / (hidden_size + 1)), no bias (Stiennon et al., 2020, "Learning to
    summarize from human feedback", appendix B).

    Args:
        path: A folder, or a hub name.
        dtype: "fp32" or "bf16".
        trust_remote_code: Whether code that comes with the model may run.
        dropout: Probability of dropout on attention weights and before the head, in training mode. Every
            other dropout of the configuration is 0.
        seed: Of a new head.
        attention: As for `choose_attention`.

    Raises:
        ModelError: No such model, an unsupported architecture, a folder that holds another kind of model, a
            head with more than one label, or weights that do not belong to the configuration.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    scalar, causal = scalar_class_name(config, path), causal_class_name(config)
    found = _saved_class(config, causal)
    if found not in (scalar, causal):
        raise ModelError(
            f"{path} holds a {found}, but a {scalar} (a reward model) or a {causal} to start one from was asked for."
        )
    new_head = found == causal
    if not new_head and config.num_labels != 1:
        raise ModelError(
            f"The {scalar} in {path} has {config.num_labels} labels; a reward model or critic has one. "
            "Train a reward model with `rlhf-ray reward`, or start from the causal language model."
        )
    config.num_labels = 1
    _set_dropout(config, attention=dropout)
    model, info = _from_pretrained(
        AutoModelForSequenceClassification, path, config, dtype, trust_remote_code, attention
    )
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if new_head:
        missing.discard("score.weight")
        unexpected = {name for name in unexpected if not name.startswith(("lm_head.", "embed_out."))}
        model.score = _new_head(config.hidden_size, DTYPES[dtype], seed)
    _check_weights(path, scalar, missing, unexpected)
    return PackedScalarModel(model, dropout)


def check_same_vocabulary(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, *, names: tuple[str, str]
) -> None:
    """Check that two tokenizers give every token the same id.

    Args:
        tokenizer: One.
        other: The other.
        names: What to call the two in the message, such as ("policy", "reference").

    Raises:
        ModelError: They differ.
    """
    a, b = tokenizer.get_vocab(), other.get_vocab()
    if a != b:
        differing = sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token))
        token = differing[0]
        raise ModelError(
            f"The {names[0]} and the {names[1]} do not share a vocabulary: {len(a)} and {len(b)} tokens, "
            f"{len(differing)} of which differ, such as {token!r} with id {a.get(token)} and {b.get(token)}. "
            "Token ids pass between them, so both must come from the same tokenizer."
        )
    if tokenizer.eos_token_id != other.eos_token_id:
        raise ModelError(
            f"The {names[0]} ends a sequence with {tokenizer.eos_token!r} and the {names[1]} with "
            f"{other.eos_token!r}. Set the same 'eos_token' in both tokenizer_config.json files."
        )


def check_tokenizer_fits(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the model has an embedding for every token id.

    Raises:
        ModelError: The tokenizer has an id that is at or beyond the model's vocabulary size.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ModelError(
            f"The tokenizer has token ids up to {largest}, but the {config.model_type} model has embeddings "
            f"for {config.vocab_size} tokens only. Use the tokenizer that belongs to the model."
        )


def describe_model(path: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Facts about a model from its configuration alone; no weights are read.

    Returns:
        `architecture` (a transformers class), `model_type`, `parameters` (tied weights counted once), `dtype`
        (of the saved weights), `context_length` (tokens), `vocab_size`, `hidden_size` and `num_layers`.

    Raises:
        ModelError: No such model, or an unsupported architecture.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    architecture = _saved_class(config, causal_class_name(config))
    scalar = architecture.endswith("ForSequenceClassification")
    auto_class = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    return {
        "architecture": architecture,
        "model_type": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "context_length": context_length(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
    }


def _check_local(path: str, needed: str) -> None:
    """Name a missing folder, or one without the file `needed`, at once, rather than ask the hub for it."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / needed).is_file():
            raise ModelError(f"The folder {path} holds no {needed}, so nothing can be loaded from it.")
    elif not is_hub_name(path):
        raise ModelError(f"The model folder {path} does not exist. Give a model folder or a hub name (owner/name).")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _saved_class(config: PreTrainedConfig, default: str) -> str:
    return config.architectures[0] if config.architectures else default


def _set_dropout(config: PreTrainedConfig, *, attention: float) -> None:
    for name in _ATTENTION_DROPOUTS + _OTHER_DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, attention if name in _ATTENTION_DROPOUTS else 0.0)


def _from_pretrained(
    auto_class: Any, path: str, config: PreTrainedConfig, dtype: str, trust_remote_code: bool, asked: str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    register()
    attention = choose_attention(DTYPES[dtype], asked)
    try:
        with quiet_transformers():
            model, info = auto_class.from_pretrained(
                path,
                config=config,
                dtype=DTYPES[dtype],
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"The weights in {path} could not be loaded: {_first_line(error)}") from error
    if model.config._attn_implementation != attention:
        raise ModelError(
            f"The {type(model).__name__} in {path} cannot run '{attention}' attention, which packed "
            f"sequences need (transformers chose '{model.config._attn_implementation}'). Use another architecture."
        )
    logger.info("%s: %s in %s with %s attention", path, type(model).__name__, dtype, attention)
    # What save_model_folder writes the weights as.
    model.config.architectures = [type(model).__name__]
    return model, info


def _check_weights(path: str, class_name: str, missing: set[str], unexpected: set[str]) -> None:
    if not missing:
        return
    found = f"it has, for instance, {min(unexpected)}" if unexpected else "nothing stands in their place"
    raise ModelError(
        f"The weights in {path} are not those of a {class_name}: {len(missing)} parameters are missing, such "
        f"as {min(missing)}; {found}. The config.json and the weights must be of the same architecture."
    )


def _new_head(hidden_size: int, dtype: torch.dtype, seed: int) -> nn.Linear:
    head = nn.Linear(hidden_size, 1, bias=False, dtype=dtype)
    weight = torch.empty(1, hidden_size).normal_(
        std=(hidden_size + 1) ** -0.5, generator=torch.Generator().manual_seed(seed)
    )
    head.weight.data.copy_(weight)
    return head
