"""A rank's part of a checkpoint: copied into main memory at once, written by a thread while training goes on.

A thread of an actor cannot answer the driver, so each rank leaves an empty file when it has written its part, or a file
with the reason when it could not; the driver looks for these markers, which are no part of the checkpoint.
"""

import json
import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf_ray.errors import CheckpointError, shortened
from rlhf_ray.runtime.chaos import reached
from rlhf_ray.training.state import PATTERN

logger = logging.getLogger(__name__)

COMMON = "trainer.json"
WRITTEN, FAILED = "written_", "failed_"


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes; nothing in it changes any more.

    Attributes:
        tensors: its part of the optimizer's state, in main memory; none where rank 0 has the same.
        metadata: of the file that they go into.
        common: what all ranks share, as JSON; rank 0 alone has it.
        random: the random generators' states by device.
    """

    rank: int
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    common: dict[str, Any] | None
    random: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write the files into the folder, whose parent must exist: it is gone where nobody waits for them any more."""
        folder.mkdir(exist_ok=True)
        state, random = state_file(folder, self.rank), random_file(folder, self.rank)
        try:
            if self.tensors:
                save_file(self.tensors, state, self.metadata)
            reached("writing a checkpoint")
            if self.common is not None:
                (folder / COMMON).write_text(json.dumps(self.common))
            torch.save(self.random, random)
        except Exception:
            for path in (state, random):  # on a full disk they are in the way of the marker
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            raise

    def write_aside(self, folder: Path) -> threading.Thread:
        """Write in a thread, and the marker after it."""
        thread = threading.Thread(target=self._write_and_mark, args=(folder,), name="checkpoint", daemon=True)
        thread.start()
        return thread

    def _write_and_mark(self, folder: Path) -> None:
        try:
            self.write(folder)
            (folder / f"{WRITTEN}{self.rank:05d}").touch()
        except Exception as error:  # of three libraries, each with its own for a full disk
            logger.warning("cannot write this rank's part of the checkpoint %s: %s", folder, error)
            marker = folder / f"{FAILED}{self.rank:05d}"
            with suppress(OSError):
                aside = marker.with_name(f".{marker.name}")
                try:
                    aside.write_text(f"{type(error).__name__}: {shortened(error)}")
                    aside.rename(marker)
                except OSError:  # a name needs less room than its content
                    marker.touch()


def state_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its part of the optimizer's state."""
    return folder / PATTERN.replace("*", f"{rank:05d}")


def random_file(folder: Path, rank: int) -> Path:
    """Where a rank writes the states of its random generators."""
    return folder / f"random_{rank:05d}.pt"


def all_written(folder: Path, ranks: int) -> bool:
    """Whether every rank has written its part; if so, the markers are removed.

    Raises:
        CheckpointError: one could not; says why.
    """
    for marker in sorted(folder.glob(f"{FAILED}*")):
        reason = marker.read_text() or "it could not even write why; see its log"
        raise CheckpointError(f"rank {int(marker.name.removeprefix(FAILED))} could not write its part: {reason}")
    written = list(folder.glob(f"{WRITTEN}*"))
    if len(written) < ranks:
        return False
    for marker in written:
        marker.unlink()
    return True
