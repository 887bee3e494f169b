"""Models with random weights, and a tokenizer of numbers, for measurements without a model at hand."""

from pathlib import Path
from typing import Any

from rlhf_ray.bench.workload import FIRST_ID

# Keys of `LlamaConfig`: 5.4 million parameters.
SMALL_LLAMA = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 688,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def write_llama(folder: Path, sizes: dict[str, Any], *, scalar: bool) -> str:
    """A Llama and its tokenizer as a transformers folder.

    Args:
        folder: where to write it.
        sizes: keys of `LlamaConfig`.
        scalar: whether it has a head with one output in place of the vocabulary's.

    Returns:
        The folder.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    config = LlamaConfig(**sizes | {"num_labels": 1, "pad_token_id": 0})
    model = (LlamaForSequenceClassification if scalar else LlamaForCausalLM)(config)
    model.save_pretrained(folder)
    words = {str(number): number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=str(FIRST_ID)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="1", pad_token="0").save_pretrained(folder)
    return str(folder)
