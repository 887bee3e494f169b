"""The directory of one run: which files it holds, who may write it, and how it is rewound on resume.

config.yaml        the resolved configuration
run.json           what makes this run this run (`identity`), and the tracker's run id
metrics.jsonl      one object a step
ledger.jsonl       what became of the samples of each iteration (PPO)
samples/           step_000001.parquet, ...
checkpoints/
logs/              one file per actor
trace/             what each process did, and what it does now
stalls/            reports of waits that ended without an answer
bad_batches/       what updates that ended the run were to train on
summary.json       written last
.lock              held by the process that writes the run
"""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rlhf_ray.errors import StageError, shortened

logger = logging.getLogger(__name__)

# A thousand times what a line of metrics has; what is longer was not written by a run.
LONGEST_LINE_BYTES = 4 * 2**20


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path whose file becomes `path` in one step when the block ends well.

    A reader sees the old file or the new one, never a part of it; a block that raises leaves the old one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class RunDirectory:
    """An open run directory; one process at a time holds it.

    Args:
        path: the directory; created when it is absent.
        resume: "auto" reopens a directory that holds this run; "never" refuses one that holds any run.
        identity: what must stay the same for a directory to be continued (seed, model, data, ...), as flat
            names and JSON values. A directory of a run with another identity is refused.

    Raises:
        StageError: the directory holds a run that may not be continued, is being written by another process,
            or cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        resume: Literal["auto", "never"] = "auto",
        identity: Mapping[str, Any] | None = None,
    ):
        self.path = Path(path).absolute()
        try:
            for directory in (self.path, self.samples, self.logs, self.checkpoints):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StageError(f"cannot create the run directory {self.path}: {error}; change `run.dir`") from error
        self._lock_fd = self._acquire_lock()
        try:
            # Through JSON, so that tuples compare equal to the lists they are read back as.
            self._check_identity(resume, json.loads(json.dumps(dict(identity or {}))))
        except BaseException:
            self.close()
            raise

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """What became of the samples of each iteration."""
        return self.path / "ledger.jsonl"

    @property
    def samples(self) -> Path:
        """Folder of the sample tables."""
        return self.path / "samples"

    @property
    def logs(self) -> Path:
        """Folder of the actors' logs."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        """What the run came to; its presence says that the run finished."""
        return self.path / "summary.json"

    def samples_of(self, step: int) -> Path:
        """The sample table of one step."""
        return self.samples / f"step_{step:06d}.parquet"

    def write_config(self, text: str) -> None:
        """Writes the resolved configuration, as text."""
        write_text(self.config, text)

    def truncate_after(self, step: int) -> None:
        """Drops metrics and samples of steps after `step`, and the summary, so that each step appears once.

        Args:
            step: the checkpoint's step, or -1 when the run starts over.

        Raises:
            StageError: a line of the metrics is damaged, other than the last, which a crash may have cut.
        """
        self.summary.unlink(missing_ok=True)
        for table in self.samples.glob("step_*.parquet"):
            if int(table.stem.removeprefix("step_")) > step:
                table.unlink()
        if self.metrics.exists():
            kept = [line for line, row in metric_rows(self.metrics) if row["step"] <= step]
            write_text(self.metrics, "".join(f"{line}\n" for line in kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The metrics written so far, one dictionary a step."""
        return [row for _, row in metric_rows(self.metrics)]

    def load_state(self) -> dict[str, Any]:
        """What `save_state` saved, and the run's identity under `identity`."""
        path = self.path / "run.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except json.JSONDecodeError as error:
            raise StageError(f"{path} is damaged ({error}); restore it or change `run.dir`") from error

    def save_state(self, **entries: Any) -> None:
        """Merges entries into `run.json`."""
        write_text(self.path / "run.json", json.dumps(self.load_state() | entries, indent=2) + "\n")

    def close(self) -> None:
        """Lets other processes write the run."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _acquire_lock(self) -> int | None:
        # The kernel drops the lock when its holder dies, so a lock file left by a dead process blocks nobody.
        lock_fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock_fd, 200, 0).decode(errors="replace").strip()
            os.close(lock_fd)
            raise StageError(
                f"the run directory {self.path} is being written by another process ({holder}); "
                "wait for it, stop it, or change `run.dir`"
            ) from error
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return lock_fd

    def _check_identity(self, resume: str, identity: dict[str, Any]) -> None:
        saved = self.load_state().get("identity")
        if saved is None and not self.config.exists():
            self.save_state(identity=identity)
            return
        if resume == "never":
            raise StageError(
                f"the run directory {self.path} already holds a run and `run.resume` is never; "
                "change `run.dir`, remove the directory, or set `run.resume=auto` to continue the run"
            )
        if saved is None:
            raise StageError(
                f"the run directory {self.path} holds config.yaml without run.json, so it is unknown "
                "which run it holds; change `run.dir` or remove the directory"
            )
        different = [
            f"{key} was {json.dumps(saved.get(key))} and is now {json.dumps(identity.get(key))}"
            for key in sorted(saved.keys() | identity.keys())
            if saved.get(key) != identity.get(key)
        ]
        if different:
            raise StageError(
                f"the run directory {self.path} holds another run: {'; '.join(different)}; "
                "restore these values to continue that run, or change `run.dir` to start a new one"
            )


def metric_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Line and object of each step in a file of metrics; a last line that a crash has cut is left out.

    Raises:
        StageError: another line is damaged.
    """
    return list(json_rows(path, {"step": int}, "metrics object"))


def json_rows(path: Path, wanted: Mapping[str, type], what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Line and object of each line in a file that a run appends to; a last line that a crash has cut is left out.

    Args:
        path: the file; without one there are no lines.
        wanted: keys that each object has, and the types of their values.
        what: what a line holds, for messages.

    Raises:
        StageError: another line is damaged, or longer than `LONGEST_LINE_BYTES`.
    """
    if not path.exists():
        return
    if not path.is_file():  # a pipe would be waited for
        raise StageError(f"{path} is no file; remove it or change `run.dir`")
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE_BYTES + 1):
            number += 1
            try:
                if len(line) > LONGEST_LINE_BYTES:
                    raise ValueError(f"more than {LONGEST_LINE_BYTES} bytes")
                text = line.decode().rstrip("\r\n")
                row = json.loads(text)
                for key, kind in wanted.items():
                    if type(row[key]) is not kind:
                        raise ValueError(f"`{key}` is {shortened(repr(row[key]), 50)}")
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                if len(line) <= LONGEST_LINE_BYTES and not file.read(1):
                    logger.warning("the last line of %s was cut short and is ignored", path)
                    return
                raise StageError(
                    f"{path}, line {number}: no {what} ({shortened(error)}); remove the line or change `run.dir`"
                ) from error
            yield text, row
