"""Checkpoints of a run: written aside, sealed by a manifest with checksums, then renamed.

A folder `step_000010` is whole or does not exist; what a crash leaves behind starts with a dot and is swept away. The
manifest is written last and names the size and SHA-256 of every file, so damage shows at resume, where the newest
whole checkpoint is taken. It also holds the checkpoint's score: the best one is kept besides the newest. A manifest
names files below its folder alone: nothing else is read for it, and what is removed to make room are folders and links
of this folder, never what a link leads to.
"""

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.errors import CheckpointError, shortened
from rlhf_ray.runtime.chaos import reached

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile("step_[0-9]{6,18}")
# Of a manifest or a state, a hundred times what a run of a thousand processes writes.
LARGEST_JSON_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its step, folder and the driver's state."""

    step: int
    folder: Path
    state: dict[str, Any]

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Around code that takes over the state: says of this checkpoint what is not there, or is of another type."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"{self.folder / STATE}: not the state that this run needs ({type(error).__name__}: "
                f"{shortened(error)}); remove the checkpoint {self.folder.name} to continue from the one before"
            ) from error


class CheckpointStore:
    """The checkpoints of one run: `prepare` one, write its files, `seal` it.

    Args:
        folder: of the checkpoints.
        keep: how many of the newest to keep, besides the one with the best score.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        for leftover in folder.glob(".step_*"):
            remove(leftover)

    def prepare(self, step: int) -> Path:
        """An empty folder for the files of the checkpoint of `step`; it is none until it is sealed.

        Raises:
            OSError: the folder cannot be made.
        """
        work = self._work(step)
        remove(work)
        work.mkdir(parents=True)
        return work

    def seal(self, step: int, state: dict[str, Any], score: float | None = None) -> Path:
        """Complete the checkpoint; older ones that are not to be kept are removed after that.

        So are those of later steps: a run that fell back to an older checkpoint left them behind, damaged.

        Args:
            step: steps or iterations done.
            state: what the driver needs to continue, as JSON.
            score: how good the model is; the checkpoint with the highest is kept.

        Raises:
            OSError: a file cannot be written.
        """
        target, work = self.folder / f"step_{step:06d}", self._work(step)
        (work / STATE).write_text(json.dumps(state))
        reached("sealing a checkpoint")
        files = sorted(path for path in work.rglob("*") if path.is_file())
        about = {str(path.relative_to(work)): [path.stat().st_size, _sha256(path)] for path in files}
        manifest = {"step": step, "score": score, "files": about}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1))
        if target.exists():  # the same step again, after a fall back to an older checkpoint
            remove(target)
        work.rename(target)
        folders = {step_of(folder): folder for folder in checkpoint_folders(self.folder)}
        kept = to_keep({number: score_of(folder) for number, folder in folders.items()}, step, self.keep)
        for number, folder in folders.items():
            if number not in kept:
                remove(folder)
        return target

    def discard(self, step: int) -> None:
        """Remove what was written of a checkpoint that will not be sealed."""
        shutil.rmtree(self._work(step), ignore_errors=True)  # a rank may be writing into it; the next start sweeps

    def newest(self) -> int | None:
        """The step of the newest checkpoint, whole or not; None without any."""
        folders = checkpoint_folders(self.folder)
        return step_of(folders[-1]) if folders else None

    def _work(self, step: int) -> Path:
        return self.folder / f".step_{step:06d}"

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints and every one of them is damaged.
        """
        problems = []
        for folder in reversed(checkpoint_folders(self.folder)):
            try:
                return Checkpoint(step_of(folder), folder, _state_of_whole(folder))
            except CheckpointError as error:
                logger.warning("checkpoint %s is damaged (%s); falling back to the one before", folder, error)
                problems.append(f"{folder.name}: {error}")
        if problems:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged:\n" + "\n".join(problems) + "\nRemove them to start over"
            )
        return None


def to_keep(scores: dict[int, float | None], newest: int, keep: int) -> set[int]:
    """Which checkpoints stay: the newest ones, and the best of them all.

    Args:
        scores: of all checkpoints by step; None where one has no score.
        newest: the step of the newest one that counts; those of later steps are left over from before a fall back.
        keep: how many of the newest.
    """
    steps = sorted((step for step in scores if step <= newest), reverse=True)
    best = max(((score, step) for step in steps if (score := scores[step]) is not None), default=None)
    return {*steps[:keep], *([best[1]] if best else [])}


def score_of(folder: Path) -> float | None:
    """The score in a checkpoint's manifest; None where there is none."""
    try:
        return score_in(_read_object(folder / MANIFEST, "manifest"))
    except CheckpointError:
        return None


def score_in(manifest: dict[str, Any]) -> float | None:
    """The score that a manifest holds; None where it is no finite number."""
    score = manifest.get("score")
    return score if isinstance(score, float) and math.isfinite(score) else None


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; files, and folders of other names, are none."""
    found = (path for path in folder.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None if it is whole."""
    try:
        _state_of_whole(folder)
    except CheckpointError as error:
        return str(error)
    return None


def _state_of_whole(folder: Path) -> dict[str, Any]:
    """The driver's state in a checkpoint whose files are all there and unchanged.

    Raises:
        CheckpointError: what is wrong with it.
    """
    manifest = _read_object(folder / MANIFEST, "manifest")
    files = manifest.get("files")
    if manifest.get("step") != step_of(folder) or not isinstance(files, dict) or STATE not in files:
        raise CheckpointError("its manifest is not that of this folder")
    try:
        for name, about in files.items():
            _check_file(folder, name, about)
    except (OSError, ValueError, RuntimeError) as error:  # names that no file can have, links in a circle
        raise CheckpointError(f"a file of its manifest cannot be read ({shortened(error)})") from error
    return _read_object(folder / STATE, "state")


def _check_file(folder: Path, name: str, about: Any) -> None:
    """Compares one file with what the manifest says about it: its size and SHA-256."""
    told = shortened(name) or "the file without a name"
    if not isinstance(about, list) or [type(value) for value in about] != [int, str]:
        raise CheckpointError(f"its manifest has no size and checksum for {told}")
    size, checksum = about
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"its manifest names {told}, which is outside of the checkpoint")
    if not path.is_file():
        raise CheckpointError(f"{told} is missing")
    if path.stat().st_size != size:
        raise CheckpointError(f"{told} has {path.stat().st_size} bytes instead of {shortened(size, 30)}")
    if _sha256(path) != checksum:
        raise CheckpointError(f"{told} differs from its checksum")


def _read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"its {what} is no file")
        with path.open("rb") as file:
            content = file.read(LARGEST_JSON_BYTES + 1)
        if len(content) > LARGEST_JSON_BYTES:
            raise CheckpointError(f"its {what} has more than {LARGEST_JSON_BYTES} bytes")
        found = json.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"its {what} cannot be read ({type(error).__name__}: {shortened(error)})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"its {what} is no JSON object, but {type(found).__name__}")
    return found


def remove(path: Path) -> None:
    """Removes a folder with all below, a file, or a link, of which what it leads to stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
