"""Errors a user can act on.

Every message says what was asked, what was found and what to change. All classes take one string, so that they
survive pickling on their way from an actor to the driver. The command line prints the message alone and exits with
`exit_code`; any other exception is a defect of this package and keeps its traceback.
"""


class RlhfError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class ConfigError(RlhfError):
    """A configuration key or value is wrong."""

    exit_code = 2


class DataError(RlhfError):
    """A data file is missing, empty or malformed."""

    exit_code = 2


class ModelError(RlhfError):
    """A model or tokenizer is missing, incomplete or does not fit the others."""

    exit_code = 2


class ResourceError(RlhfError):
    """The cluster lacks what the run needs, or did not grant it in time."""


class RewardError(RlhfError):
    """A reward model or reward function failed, hung or returned something that is no score."""


class CheckpointError(RlhfError):
    """A checkpoint is missing, damaged or belongs to another model."""


class EngineError(RlhfError):
    """A rollout engine, scorer or trainer failed or missed its deadline."""


class ActorDied(EngineError):
    """The process of an actor ended while something was asked of it."""


class Stalled(EngineError):
    """No answer came in time: something hangs, or its work takes longer than it was given."""


class BudgetExhausted(EngineError):
    """Something failed as often as its budget allows; another try would fail as well."""

    exit_code = 3


class StageError(RlhfError):
    """A stage cannot start or continue, such as a run directory that already holds another run."""


class PackageError(RlhfError):
    """The folder that a job would upload holds weights or runs, or is too large."""

    exit_code = 2


class JobError(RlhfError):
    """A job cannot be submitted, found, followed or stopped, or the cluster that should run it does not answer."""


class RunStopped(RlhfError):
    """The run was asked to stop (SIGTERM, or Ctrl-C), wrote a checkpoint and ended; the same command continues it."""

    exit_code = 143


def shortened(text: object, most: int = 200) -> str:
    """Text on one line for a message, cut after `most` characters: files decide what is in it, and how much of it."""
    whole = str(text)
    # Half a surrogate pair cannot be printed.
    line = " ".join(whole[: 4 * most].encode(errors="backslashreplace").decode().split())
    return line if len(line) <= most and len(whole) <= 4 * most else f"{line[:most]}..."
