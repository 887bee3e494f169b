"""Copies of a run's checkpoints in a storage that fsspec reaches, for runs whose folder may be lost with its machine.

The storage has the folders of the checkpoints as the run has them, and beside them `run.json`, which says whose they
are, and the records of the steps before: metrics, ledger and samples. A manifest is uploaded last and removed first, so
that what a crash leaves half there is no checkpoint.
"""

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf_ray.driver.checkpoint import (
    LARGEST_JSON_BYTES,
    MANIFEST,
    NAME,
    CheckpointStore,
    checkpoint_folders,
    damage,
    remove,
    score_in,
    step_of,
    to_keep,
)
from rlhf_ray.errors import CheckpointError, ConfigError, StageError, shortened

logger = logging.getLogger(__name__)

IDENTITY = "run.json"
# What a run writes at each step, beside its checkpoints.
FILES = ("metrics.jsonl", "ledger.jsonl")
SAMPLES = "samples"
RECORDS = (*FILES, SAMPLES)
# Where a checkpoint is downloaded to; the store sweeps it after a crash.
ARRIVING = ".step_arriving"
ARRIVING_FILE = ".arriving"  # after the name of a record on its way


class StorageUnreachable(StageError):
    """A storage for checkpoints does not answer, or refuses."""


class CheckpointStorage:
    """The copies of one run's checkpoints.

    Args:
        url: where they are, such as s3://bucket/path; a run has a folder of its own there.

    Attributes:
        start_step: where this process begins; it writes the samples of later steps anew.

    Raises:
        ConfigError: fsspec knows no such storage, or needs a package for it.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url
        try:
            self._files, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"run.checkpoint_storage: cannot use {url}: {shortened(error)}; install what it needs, or name "
                "another storage"
            ) from error
        self._root = root.rstrip("/")
        self._damaged: set[str] = set()
        self.start_step = 0
        self._copied: dict[str, int] = {}  # tables of samples by name, and when they were written

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make it this run's, if it is nobody's yet.

        Raises:
            StageError: it is another run's.
            StorageUnreachable: it cannot be reached.
        """
        mine = json.loads(json.dumps(dict(identity)))
        with self._reached("use"):
            self._files.invalidate_cache()
            if not self._files.exists(self._path(IDENTITY)):
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(self._path(IDENTITY), json.dumps(mine).encode())
                return
            theirs = json.loads(self._files.cat_file(self._path(IDENTITY)))
        different = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
        if different:
            key = different[0]
            raise StageError(
                f"{self.url} has the checkpoints of another run: {key} was {json.dumps(theirs.get(key))} and is now "
                f"{json.dumps(mine.get(key))}; set run.checkpoint_storage to a folder of this run's own"
            )

    def fetch(self, folder: Path) -> None:
        """Download the newest whole checkpoint into the folder of a run that has none, and the records that it lacks.

        Raises:
            StorageUnreachable: the storage cannot be reached.
            CheckpointError: it has checkpoints, and none of them is whole.
        """
        problems = []
        with self._reached("continue from"):
            for step in sorted(self._manifests(), reverse=True):
                name = f"step_{step:06d}"
                arriving = folder / ARRIVING / name
                remove(folder / ARRIVING)
                problem = self._download(name, arriving) or damage(arriving)
                if problem is None:
                    # Last, so that a run that has a checkpoint has its records, too.
                    self._fetch_records(folder.parent)
                    arriving.rename(folder / name)
                    logger.info("fetched the checkpoint %s from %s", name, self.url)
                    break
                logger.warning("%s/%s is damaged (%s); falling back to the one before", self.url, name, problem)
                problems.append(f"{name}: {problem}")
                self._damaged.add(name)
            else:
                if problems:
                    raise CheckpointError(
                        f"every checkpoint in {self.url} is damaged:\n"
                        + "\n".join(problems)
                        + "\nRemove them to start over"
                    )
        remove(folder / ARRIVING)

    def copy(self, store: CheckpointStore, given_up: threading.Event) -> None:
        """Upload the checkpoints that are not there yet, the newest first, and remove old ones as the store does.

        The records of the run go before them, so that they reach at least as far.

        What fails is warned about; the next call tries it again.
        """
        try:
            folders = checkpoint_folders(store.folder)[::-1]
            self._try_records(store.folder.parent, given_up)
            for folder in folders:
                self._upload(folder, given_up)
            manifests = self._manifests()
            scores = {step: score_in(manifest) for step, manifest in manifests.items()}
            kept = to_keep(scores, step_of(folders[0]), store.keep)
            for step in manifests:
                if step not in kept and not given_up.is_set():
                    self._remove(f"step_{step:06d}")
        except Exception as error:  # each storage has errors of its own
            self._failed("checkpoints", error)

    def _failed(self, what: str, error: Exception) -> None:
        logger.warning(
            "cannot copy %s to %s (%s: %s); the next checkpoint tries again",
            what,
            self.url,
            type(error).__name__,
            shortened(error),
        )

    def _try_records(self, run: Path, given_up: threading.Event) -> None:
        try:
            self._copy_records(run, given_up)
        except Exception as error:  # each storage has errors of its own, and checkpoints count more
            self._failed("metrics, ledger and samples", error)

    def _copy_records(self, run: Path, given_up: threading.Event) -> None:
        self._files.makedirs(self._root, exist_ok=True)
        for name in FILES:
            if (run / name).is_file():
                self._replace(run / name, name)
        there = self._tables()
        for file in sorted((run / SAMPLES).glob("*.parquet")):
            about = file.stat()
            of_this_process = file.name >= f"step_{self.start_step:06d}"
            if of_this_process:
                known = self._copied.get(file.name) == about.st_mtime_ns
            else:
                known = there.get(file.name) == about.st_size
            if known:
                continue
            if given_up.is_set():
                return
            self._files.makedirs(self._path(SAMPLES), exist_ok=True)
            self._replace(file, f"{SAMPLES}/{file.name}")
            self._copied[file.name] = about.st_mtime_ns

    def _replace(self, file: Path, name: str) -> None:
        """Upload a file in place of what is there, in one step: the checkpoints that are there need it."""
        arriving = self._path(f"{name}{ARRIVING_FILE}")
        self._files.put_file(str(file), arriving)
        self._files.mv(arriving, self._path(name))

    def _fetch_records(self, run: Path) -> None:
        """Of the steps until the checkpoint and a few later ones, which the run forgets as it continues."""
        names = [name for name in FILES if self._files.exists(self._path(name))]
        names += [f"{SAMPLES}/{name}" for name in self._tables()]
        for name in names:
            if not (run / name).exists():
                (run / name).parent.mkdir(exist_ok=True)
                arriving = run / f"{name}{ARRIVING_FILE}"
                self._files.get_file(self._path(name), str(arriving))
                arriving.rename(run / name)

    def _tables(self) -> dict[str, int]:
        """The tables of samples that are there, with their sizes in bytes."""
        if not self._files.exists(self._path(SAMPLES)):
            return {}
        found = self._files.ls(self._path(SAMPLES), detail=True)
        sizes = {one["name"].rpartition("/")[2]: one["size"] for one in found}
        return {name: size for name, size in sorted(sizes.items()) if name.endswith(".parquet")}

    def _upload(self, folder: Path, given_up: threading.Event) -> None:
        manifest = (folder / MANIFEST).read_bytes()
        there = self._path(f"{folder.name}/{MANIFEST}")
        self._files.invalidate_cache()
        whole = folder.name not in self._damaged and self._files.exists(there)
        if whole and self._files.cat_file(there) == manifest:
            return
        self._remove(folder.name)
        for name in json.loads(manifest)["files"]:
            if given_up.is_set():
                return
            target = self._path(f"{folder.name}/{name}")
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(folder / name), target)
        self._files.pipe_file(there, manifest)
        self._damaged.discard(folder.name)

    def _download(self, name: str, folder: Path) -> str | None:
        """Every file that the manifest names; returns what is wrong with it, as far as that shows."""
        folder.mkdir(parents=True)
        content = self._files.cat_file(self._path(f"{name}/{MANIFEST}"))
        (folder / MANIFEST).write_bytes(content)
        for file in _files_of(content):
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                return f"its manifest names {shortened(file)}, which is outside of the checkpoint"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                self._files.get_file(self._path(f"{name}/{file}"), str(folder / file))
            except FileNotFoundError:
                return f"{shortened(file)} is missing"
        return None

    def _remove(self, name: str) -> None:
        manifest = self._path(f"{name}/{MANIFEST}")
        if self._files.exists(manifest):
            self._files.rm_file(manifest)
        if self._files.exists(self._path(name)):
            self._files.rm(self._path(name), recursive=True)

    def _manifests(self) -> dict[int, dict[str, Any]]:
        """The manifests of all checkpoints there, by step; one that cannot be read as an empty one."""
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return {}
        found = {}
        for path in self._files.ls(self._root, detail=False):
            name = path.rstrip("/").rpartition("/")[2]
            manifest = self._path(f"{name}/{MANIFEST}")
            if NAME.fullmatch(name) and self._files.exists(manifest):
                found[int(name.removeprefix("step_"))] = _parsed(self._files.cat_file(manifest))
        return found

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _reached(self, what: str) -> Iterator[None]:
        try:
            yield
        except (StageError, CheckpointError):
            raise
        except Exception as error:  # each storage has errors of its own
            raise StorageUnreachable(
                f"cannot {what} run.checkpoint_storage {self.url} ({type(error).__name__}: {shortened(error)}); see to "
                "it that it can be reached, or leave run.checkpoint_storage out"
            ) from error


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content) if len(content) <= LARGEST_JSON_BYTES else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _files_of(manifest: bytes) -> list[str]:
    files = _parsed(manifest).get("files")
    return list(files) if isinstance(files, dict) else []
