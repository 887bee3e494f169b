"""Asking a trained policy: prompts in, replies out, in this process and without actors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.data import parse_prompts, read_rows
from rlhf_ray.data.chat import encode_prompts
from rlhf_ray.data.formats import Content
from rlhf_ray.errors import DataError, ModelError
from rlhf_ray.models.loading import check_tokenizer_fits, describe_model, load_config, load_tokenizer
from rlhf_ray.names import FILE_SUFFIXES
from rlhf_ray.rollout.offline import Sampling, sample_offline


@dataclass(frozen=True)
class Reply:
    """What the policy said.

    Attributes:
        prompt: as it was given.
        text: the reply, special tokens left out.
        tokens: its length, the end-of-sequence token included.
        finish_reason: "stop" where the policy ended the reply, "length" where a limit did.
    """

    prompt: Content
    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Question:
    """Everything that is known before the engine starts.

    Attributes:
        model: model folder or hub name.
        facts: what `describe_model` says of it.
        tokenizer: of the model.
        prompts: as they were given.
        token_ids: the prompts as the engine reads them.
        max_model_len: tokens of the longest prompt with its reply, within the model's context.
    """

    model: str
    facts: dict[str, Any]
    tokenizer: Any
    prompts: list[Content]
    token_ids: list[list[int]]
    max_model_len: int


def generate(model: str, prompts: Sequence[Content], sampling: Sampling | None = None) -> list[Reply]:
    """One reply to each prompt.

    Args:
        model: model folder, run directory (its `model` folder is taken) or hub name.
        prompts: strings or lists of messages. A string is a user message where the tokenizer has a chat template,
            else the text to continue.
        sampling: limits, temperature and seed.

    Raises:
        ModelError: no such model, or not a causal language model.
        DataError: a prompt without tokens, or one that fills the context.
    """
    sampling = sampling or Sampling()
    question = prepare_question(model, prompts, sampling)
    sampled = sample_offline(
        question.model,
        question.token_ids,
        sampling,
        dtype=question.facts["dtype"],
        max_model_len=question.max_model_len,
        eos_token_id=question.tokenizer.eos_token_id,
    )
    texts = question.tokenizer.batch_decode([one.token_ids for one in sampled], skip_special_tokens=True)
    return [
        Reply(prompt, text, len(one.token_ids), one.finish_reason)
        for prompt, text, one in zip(question.prompts, texts, sampled, strict=True)
    ]


def prepare_question(model: str, prompts: Sequence[Content], sampling: Sampling) -> Question:
    """Checks and tokenises what `generate` was asked; arguments and errors are the same."""
    if not prompts:
        raise DataError("no prompt was given")
    path = resolve_model(model)
    facts = describe_model(path)
    check_causal(path, facts)
    tokenizer = load_tokenizer(path)
    check_tokenizer_fits(load_config(path), tokenizer)
    contents: list[Content] = [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) and tokenizer.chat_template else prompt
        for prompt in prompts
    ]
    token_ids: list[list[int]] = []
    for number, ids in enumerate(encode_prompts(tokenizer, contents), start=1):
        if isinstance(ids, DataError):
            raise DataError(f"prompt {number}: {ids}")
        if len(ids) >= facts["context_length"]:
            raise DataError(
                f"prompt {number} has {len(ids)} tokens and the context of {path} is {facts['context_length']}, which "
                "leaves no room for a reply; shorten the prompt"
            )
        token_ids.append(ids)
    longest = max(map(len, token_ids)) + sampling.max_new_tokens
    return Question(path, facts, tokenizer, list(prompts), token_ids, min(longest, facts["context_length"]))


def resolve_model(model: str) -> str:
    """The model folder that a run directory left, or `model` itself.

    Raises:
        ModelError: a run directory without a model: an unfinished run, or a pipeline of several.
    """
    folder = Path(model)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return model
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    stages = sorted(str(found.parents[1]) for found in folder.glob("*/model/config.json"))
    if stages:
        raise ModelError(f"{model} holds several stages; name one of them: {', '.join(stages)}")
    raise ModelError(
        f"{model} holds neither a model (config.json) nor a run that left one (model/config.json). Finish the run, or "
        "name another folder"
    )


def read_prompts(path: str) -> list[Content]:
    """Prompts from a file: a data file as for training (`.jsonl`, `.json`, `.parquet`), or text with one a line.

    Raises:
        DataError: no such file, or no prompt in it.
    """
    file = Path(path)
    if file.suffix in FILE_SUFFIXES:
        prompts, _ = parse_prompts(read_rows(path))
        return [prompt.content for prompt in prompts]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the prompts: {error}") from error
    found: list[Content] = [line for line in lines if line.strip()]
    if not found:
        raise DataError(f"{path}: holds no prompt; write one a line")
    return found


def check_causal(path: str, facts: dict[str, Any]) -> None:
    """Refuse a model that cannot speak, such as a reward model.

    Args:
        path: for the message.
        facts: what `describe_model` says of it.

    Raises:
        ModelError: not a causal language model.
    """
    if facts["architecture"].endswith("ForSequenceClassification"):
        raise ModelError(
            f"{path} holds a {facts['architecture']}, which scores text and writes none. Give the folder of a causal "
            "language model, such as the result of sft, dpo or ppo"
        )
