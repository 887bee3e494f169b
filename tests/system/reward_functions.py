"""Reward functions of the tests, with TRL's signature. The actors import this module by name."""

import asyncio
import math
import os
import time
from typing import Any


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def num_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Response tokens, end-of-sequence included."""
    return [float(len(ids)) for ids in completion_ids]


async def async_num_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The same, from a coroutine."""
    await asyncio.sleep(0.01)
    return num_tokens(completion_ids)


def contract(
    prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
) -> list[float]:
    """Checks what it is called with; scores each reply by its column `answer`."""
    answers = columns["answer"]
    size = len(prompts)
    assert len(completions) == len(completion_ids) == len(answers) == size
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(prompt, str):
            assert isinstance(completion, str)
        else:
            assert prompt[-1]["role"] == "user"
            assert [message["role"] for message in completion] == ["assistant"]
    return [float(answer) for answer in answers]


def _misbehave(faults: list[str | None], size: int) -> list[float | None]:
    """As the column says: the fault of any reply of the call, or of that reply alone."""
    if "raise" in faults:
        raise KeyError("no such answer")
    if "hang" in faults:
        time.sleep(600)
    if "die" in faults:
        os._exit(1)
    if "short" in faults:
        return [1.0] * (size - 1)
    if "text" in faults:
        return ["good"] * size  # type: ignore[list-item]
    scores = {None: 1.0, "none": None, "nan": math.nan, "inf": math.inf}
    return [scores[fault] for fault in faults]


def strict(completions: list[Any], strict_fault: list[str | None], **kwargs: Any) -> list[float | None]:
    """Fails as the column `strict_fault` says; its failure shall stop the run."""
    return _misbehave(strict_fault, len(completions))


def lenient(completions: list[Any], lenient_fault: list[str | None], **kwargs: Any) -> list[float | None]:
    """Fails as the column `lenient_fault` says; its failure shall exclude the samples."""
    return _misbehave(lenient_fault, len(completions))


def scarce(completion_ids: list[list[int]], answer: list[int], **kwargs: Any) -> list[float | None]:
    """Has nothing to say of every third prompt."""
    return [None if one % 3 == 0 else float(len(ids)) for ids, one in zip(completion_ids, answer, strict=True)]


def low_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Share of the tokens whose id is below 160, about half of the tiny vocabulary: easily learned."""
    return [sum(token < 160 for token in ids) / len(ids) for ids in completion_ids]


def zero(completions: list[Any], **kwargs: Any) -> list[float]:
    """Nothing to gain."""
    return [0.0] * len(completions)
