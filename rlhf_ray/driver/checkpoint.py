"""Checkpoints of a run: written aside, sealed by a manifest with checksums, then renamed.

A folder `step_000010` is whole or does not exist; what a crash leaves behind starts with a dot and is swept away. The
manifest is written last and names the size and SHA-256 of every file, so damage shows at resume, where the newest
whole checkpoint is taken. A manifest names files below its folder alone: nothing else is read for it, and what is
removed to make room are folders and links of this folder, never what a link leads to.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.errors import CheckpointError, shortened

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
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
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        for leftover in folder.glob(".step_*"):
            _remove(leftover)

    def write(self, step: int, state: dict[str, Any], save: Callable[[Path], None]) -> Path:
        """Write the checkpoint of `step`; older ones beyond the number to keep are removed after it is complete.

        So are those of later steps: a run that fell back to an older checkpoint left them behind, damaged.

        Args:
            step: steps or iterations done.
            state: what the driver needs to continue, as JSON.
            save: writes everything else into the folder it is given.
        """
        target = self._folder / f"step_{step:06d}"
        work = self._folder / f".{target.name}"
        _remove(work)
        work.mkdir(parents=True)
        save(work)
        (work / STATE).write_text(json.dumps(state))
        files = sorted(path for path in work.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(work)): [path.stat().st_size, _sha256(path)] for path in files}
        (work / MANIFEST).write_text(json.dumps({"step": step, "files": manifest}, indent=1))
        if target.exists():  # the same step again, after a fall back to an older checkpoint
            _remove(target)
        work.rename(target)
        folders = self._folders()
        newest = folders.index(target)
        for superfluous in folders[:newest] + folders[newest + self._keep :]:
            _remove(superfluous)
        return target

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints and every one of them is damaged.
        """
        problems = []
        for folder in self._folders():
            try:
                return Checkpoint(step_of(folder), folder, _state_of_whole(folder))
            except CheckpointError as error:
                logger.warning("checkpoint %s is damaged (%s); falling back to the one before", folder, error)
                problems.append(f"{folder.name}: {error}")
        if problems:
            raise CheckpointError(
                f"every checkpoint in {self._folder} is damaged:\n"
                + "\n".join(problems)
                + "\nRemove them to start over"
            )
        return None

    def _folders(self) -> list[Path]:
        """Newest first."""
        return checkpoint_folders(self._folder)[::-1]


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; files, and folders of other names, are none."""
    found = (path for path in folder.glob("step_*") if re.fullmatch("step_[0-9]{6,18}", path.name) and path.is_dir())
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


def _remove(path: Path) -> None:
    """Removes a folder with all below, a file, or a link, of which what it leads to stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
