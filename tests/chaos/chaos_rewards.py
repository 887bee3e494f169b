"""Reward functions that fail once, when the plan marks it, and else give every reply 0, as if they were not there."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from rlhf_ray.runtime.chaos import CHAOS, HAPPENED


def _marked() -> bool:
    """Whether this call is the one that is to fail."""
    file = Path(os.environ[CHAOS]).with_name(f"failure{HAPPENED}")
    done = file.with_suffix(".done")
    if not file.exists() or json.loads(file.read_text())["process"] != os.getpid() or done.exists():
        return False
    done.touch()
    return True


def hangs(completions: list[Any], **_: Any) -> list[float]:
    if _marked():
        time.sleep(600)
    return [0.0] * len(completions)


def raises(completions: list[Any], **_: Any) -> list[float]:
    if _marked():
        raise KeyError("no such answer")
    return [0.0] * len(completions)


def gives_nan(completions: list[Any], **_: Any) -> list[float]:
    return [math.nan if _marked() else 0.0] + [0.0] * (len(completions) - 1)
