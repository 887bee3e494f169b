"""What is asked of a run while it runs: a small file in its directory, which the loop reads between iterations."""

import fcntl
import json
import logging
import os
from pathlib import Path

from rlhf_ray.config.load import read_mapping
from rlhf_ray.errors import StageError
from rlhf_ray.tracking.rundir import write_text

logger = logging.getLogger(__name__)

CONTROL = "control.json"


def ask_for_engines(run_dir: Path, count: int) -> None:
    """Ask the PPO run in `run_dir` to have `count` rollout engines from its next iteration on.

    Raises:
        StageError: no process works on a PPO run there.
    """
    if not (run_dir / "config.yaml").is_file():
        raise StageError(f"{run_dir} holds no run; name the directory of a running PPO run")
    if "\nrollout:" not in (run_dir / "config.yaml").read_text(encoding="utf-8"):
        raise StageError(f"{run_dir} holds no PPO run (its configuration has no `rollout`), and only PPO has engines")
    placement = read_mapping(run_dir / "config.yaml", "a run's configuration").get("placement", {})
    if any("rollout" in together for together in placement.get("share", [])):
        raise StageError(
            f"the engines of {run_dir} share their places, one beside each process of other groups (placement.share), "
            "and cannot scale by themselves; stop the run and start it with other numbers of both"
        )
    if not _is_held(run_dir / ".lock"):
        raise StageError(
            f"no process works on the run in {run_dir}; start it again, with rollout.engines={count} if that is wanted"
        )
    write_text(run_dir / CONTROL, json.dumps({"rollout": count}) + "\n")


def wanted_engines(run_dir: Path) -> int | None:
    """How many engines were asked for since the run began or continued; None where nothing was."""
    try:
        return int(json.loads((run_dir / CONTROL).read_text(encoding="utf-8"))["rollout"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is no request that this run understands (%s); removing it", run_dir / CONTROL, error)
        forget(run_dir)
        return None


def forget(run_dir: Path) -> None:
    """Drop what was asked: a run that starts or continues follows its configuration."""
    (run_dir / CONTROL).unlink(missing_ok=True)


def _is_held(lock: Path) -> bool:
    """Whether a process holds the lock of a run directory."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
