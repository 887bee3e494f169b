"""Where a stage's model and tokenizer come from: a folder, the hub, or nothing."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rlhf_ray.config.sections import LoadingSection, ModelSection
from rlhf_ray.data import DEFAULT_CHAT_TEMPLATE, ensure_chat_template
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import check_tokenizer_fits, context_length, load_config, load_tokenizer
from rlhf_ray.models.saving import is_complete
from rlhf_ray.models.scratch import build_from_scratch
from rlhf_ray.names import on_disk

logger = logging.getLogger(__name__)


def prepare_model(section: ModelSection, run_dir: Path, seed: int, texts: Callable[[], Iterable[str]]) -> str:
    """The model folder (or hub name) to start from; a model from scratch is made in the run directory once.

    Args:
        texts: what the tokenizer of a model from scratch is trained on.

    Raises:
        ConfigError: neither a path nor a shape is given.
    """
    if section.scratch is not None:
        folder = run_dir / "scratch"
        if not is_complete(folder):
            build_from_scratch(section.scratch, texts(), folder, seed, DEFAULT_CHAT_TEMPLATE)
        return str(folder)
    if not section.path:
        raise ConfigError("model.path: not given; name a model folder or hub name, or give model.scratch")
    return on_disk(section.path)


def prepare_tokenizer(path: str, section: LoadingSection, run_dir: Path) -> tuple[Any, str]:
    """The tokenizer, with a chat template if one was asked for, and the folder in the run directory that keeps it.

    Raises:
        ModelError: no tokenizer, no end-of-sequence token, or a token the model has no embedding for.
    """
    if section.trust_remote_code:
        logger.warning(
            "trust_remote_code is on: Python code that comes with %s and the run's other models may run", path
        )
    tokenizer = load_tokenizer(path, trust_remote_code=section.trust_remote_code)
    ensure_chat_template(tokenizer, section.chat_template)
    check_tokenizer_fits(load_config(path, trust_remote_code=section.trust_remote_code), tokenizer)
    folder = run_dir / "tokenizer"
    tokenizer.save_pretrained(folder)
    return tokenizer, str(folder)


def check_context(path: str, longest: int, keys: str, trust_remote_code: bool) -> None:
    """Refuse sequences longer than the model's context.

    Raises:
        ConfigError: they are.
    """
    limit = context_length(load_config(path, trust_remote_code=trust_remote_code))
    if longest > limit:
        raise ConfigError(
            f"{keys}: sequences of up to {longest} tokens, and the context of {path} is {limit}; lower it"
        )
