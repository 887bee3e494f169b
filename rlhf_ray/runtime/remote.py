"""Waiting for actors: every wait has a deadline and says who was waited for, for what and how long."""

import time
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from rlhf_ray.errors import ActorDied, EngineError, RlhfError, Stalled
from rlhf_ray.runtime.patience import Patience

START_TIMEOUT_S = 300.0  # for an actor's process to exist and import its libraries
# Whoever worked with a process that died may report a broken connection before Ray reports the death.
DEATH_SHOWS_WITHIN_S = 5.0
DEATHS = (RayActorError, NodeDiedError, ObjectLostError, LocalRayletDiedError, WorkerCrashedError)


def get(ref: Any, what: str, timeout_s: float) -> Any:
    """The value of one object reference, or of a list of them.

    Args:
        ref: an object reference or a list of them.
        what: who does what, in words ("policy trainer: optimizer step"), for the error.
        timeout_s: seconds to wait at the most.

    Raises:
        Stalled: the deadline passed.
        ActorDied: an actor's process ended, or its node did; of several answers this counts before what others raised.
        EngineError: an actor raised something else, also while it was created.
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
        if isinstance(ref, list) and (death := _death(ref)):
            raise ActorDied(f"{what}: the actor died: {facts(death)}") from None
        cause = error.cause
        if isinstance(cause, RlhfError):
            raise cause from None
        raise EngineError(f"{what}: failed after {time.monotonic() - started:.1f} s\n{error}") from error
    except DEATHS as error:
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise EngineError(f"{what}: {error}") from error  # it raised, and would do so again
        raise ActorDied(
            f"{what}: the actor died after {time.monotonic() - started:.1f} s of waiting: {facts(error)}"
        ) from None
    except RayError as error:
        raise EngineError(f"{what}: {error}") from error


def free_name(name: str) -> str:
    """The name for an actor, with a number where another still has it: Ray gives names free some time after a death."""
    for number in count():
        candidate = f"{name}.{number}" if number else name
        try:
            ray.get_actor(candidate)
        except ValueError:
            return candidate
    raise AssertionError


def _death(refs: list[Any]) -> RayError | None:
    """The death of one of several actors that work together, one of which has raised something; None without any."""
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=DEATH_SHOWS_WITHIN_S)
    for ref in done:
        try:
            ray.get(ref, timeout=DEATH_SHOWS_WITHIN_S)
        except DEATHS as error:
            return error
        except RayError:
            continue
    return None


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


def facts(error: RayError) -> str:
    """What Ray knows of a death, on one line: who, where and how, without its guesses at causes."""
    return " ".join(str(error).partition("Some common causes")[0].split())
