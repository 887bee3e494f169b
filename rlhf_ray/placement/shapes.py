"""The shape of a model from its `config.json` alone, without torch or transformers.

A test holds the counts of all supported architectures within one per cent of transformers' own.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.config.sections import ScratchSection
from rlhf_ray.errors import ModelError
from rlhf_ray.names import expanded

KNOWN_SHAPES = Path(__file__).with_name("known_shapes.yaml")

# GPT-2's names of what the others call by one name.
ALIASES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
# Feed-forward layers with two matrices instead of three.
UNGATED = ("gpt2", "gpt_neox", "phi", "starcoder2")
# Output layers that are the embeddings where a configuration does not say.
TIED = ("gpt2", "gemma", "gemma2", "gemma3_text", "cohere")


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on.

    Attributes:
        parameters: of the language model, tied embeddings counted once.
        kv_width: key-value heads times head dimension.
        gated: whether the feed-forward layer has three matrices.
        head_parameters: of an output layer of its own; 0 where it is tied to the embeddings.
        largest_layer: parameters of one layer.
    """

    parameters: int
    hidden: int
    layers: int
    attention_width: int
    kv_width: int
    intermediate: int
    vocab: int
    gated: bool
    head_parameters: int
    largest_layer: int

    @property
    def scalar_parameters(self) -> int:
        """Parameters of the same body with a scalar head."""
        return self.parameters - self.head_parameters + self.hidden


def shape_from_config(values: Mapping[str, Any]) -> ModelShape:
    """The shape that the values of a `config.json` describe.

    Raises:
        KeyError: it lacks a size.
    """
    v = {ALIASES.get(name, name): value for name, value in values.items()}
    kind = v.get("model_type", "llama")
    hidden, layers, heads = v["hidden_size"], v["num_hidden_layers"], v["num_attention_heads"]
    head_dim = v.get("head_dim") or hidden // heads
    kv_width = (v.get("num_key_value_heads") or heads) * head_dim
    intermediate = v.get("n_inner" if kind == "gpt2" else "intermediate_size") or 4 * hidden
    attention_width = heads * head_dim
    gated = kind not in UNGATED
    attention = 2 * hidden * attention_width + 2 * hidden * kv_width
    mlp = (3 if gated else 2) * hidden * intermediate
    # Biases and norms are vectors beside matrices: all of them count as two of the hidden size.
    layer = attention + mlp + 2 * hidden
    embeddings = v["vocab_size"] * hidden
    head = 0 if v.get("tie_word_embeddings", kind in TIED) else embeddings
    return ModelShape(
        parameters=embeddings + layers * layer + hidden + head,
        hidden=hidden,
        layers=layers,
        attention_width=attention_width,
        kv_width=kv_width,
        intermediate=intermediate,
        vocab=v["vocab_size"],
        gated=gated,
        head_parameters=head,
        largest_layer=layer,
    )


def shape_from_scratch(section: ScratchSection) -> ModelShape:
    """The shape of a model that a stage makes, a Llama without biases."""
    return shape_from_config(
        {
            "hidden_size": section.hidden_size,
            "num_hidden_layers": section.num_layers,
            "num_attention_heads": section.num_heads,
            "num_key_value_heads": section.num_kv_heads,
            "intermediate_size": section.intermediate_size,
            "vocab_size": section.vocab_size,
            "tie_word_embeddings": section.tie_embeddings,
        }
    )


def find_shape(name: str) -> ModelShape | None:
    """The shape of a model folder, of a hub model in the local cache, or of one that this package knows.

    Returns:
        None where nothing is known without asking the hub.

    Raises:
        ModelError: the folder's `config.json` cannot be read.
    """
    folder = expanded(name)
    values: Any = None
    if folder.is_dir():
        values = _read(folder / "config.json")
    elif (cached := _cached_config(name)) is not None:
        values = _read(cached)
    else:
        values = yaml.safe_load(KNOWN_SHAPES.read_text(encoding="utf-8")).get(name)
    if values is None:
        return None
    try:
        return shape_from_config(values)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{name}: its config.json has no usable {error}; memory cannot be estimated") from None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); give a complete model folder") from None


def _cached_config(name: str) -> Path | None:
    """`config.json` of a hub model that was fetched before."""
    from huggingface_hub import try_to_load_from_cache

    if name.count("/") > 1 or not name or name.startswith((".", "/", "~")):
        return None
    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None
