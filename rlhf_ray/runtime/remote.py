"""Waiting for actors: every wait has a deadline and says who was waited for, for what and how long."""

import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rlhf_ray.errors import ActorDied, EngineError, RlhfError, Stalled
from rlhf_ray.runtime.patience import Patience

START_TIMEOUT_S = 300.0  # for an actor's process to exist and import its libraries


def get(ref: Any, what: str, timeout_s: float) -> Any:
    """The value of one object reference, or of a list of them.

    Args:
        ref: an object reference or a list of them.
        what: who does what, in words ("policy trainer: optimizer step"), for the error.
        timeout_s: seconds to wait at the most.

    Raises:
        Stalled: the deadline passed.
        ActorDied: an actor's process ended.
        EngineError: an actor raised something else.
        RlhfError: an actor raised this package's own error; it arrives as it was raised.
    """
    started = time.monotonic()
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise Stalled(
            f"{what}: no answer within {timeout_s:g} s. The actor may hang or be starved of CPUs; its log is in the "
            "run's folder `logs`. If the work is merely slow, raise run.timeout_s, or run.min_timeout_s where it was "
            "much quicker before"
        ) from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RlhfError):
            raise cause from None
        raise EngineError(f"{what}: failed after {time.monotonic() - started:.1f} s\n{error}") from error
    except RayActorError as error:
        raise ActorDied(
            f"{what}: the actor died after {time.monotonic() - started:.1f} s of waiting: {_facts(error)}"
        ) from None
    except RayError as error:
        raise EngineError(f"{what}: {error}") from error


@dataclass
class Answer:
    """An answer under way, of one actor or of several.

    Attributes:
        refs: an object reference or a list of them.
        phase: who does what, in words; answers of one phase take alike.
    """

    refs: Any
    phase: str
    patience: Patience
    asked: float = field(default_factory=time.monotonic)

    def result(self) -> Any:
        """Wait for it as long as its phase may take; raises as `get`."""
        value = get(self.refs, self.phase, self.patience.limit(self.phase))
        self.patience.took(self.phase, time.monotonic() - self.asked)
        return value


def _facts(error: RayActorError) -> str:
    """What Ray knows of a death, on one line: who, where and how, without its guesses at causes."""
    return " ".join(str(error).partition("Some common causes")[0].split())
