"""What a job uploads: a folder without what its ignore files name, weights or runs, and the resolved configuration.

The archive is made here rather than by Ray, so that what was checked is what is sent.
"""

import os
import posixpath
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathspec import GitIgnoreSpec
from pydantic import BaseModel

from rlhf_ray.errors import ConfigError, PackageError
from rlhf_ray.names import expanded, looks_local

# The cluster's dashboard takes no larger request. Ray's limit on one message, 512 MiB, is above it.
UPLOAD_LIMIT_BYTES = 100 * 2**20
CONFIG_NAME = ".rlhf_ray_job.yaml"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".distcp"}
IGNORE_FILES = (".gitignore", ".rayignore")
# Ray leaves these out of every working directory.
NEVER_UPLOADED = {".git", ".venv", "venv", "__pycache__"}
# Keys whose values are names of data, models or templates; those of reward functions are Python names.
PATH_KEYS = {"path", "eval_path", "ptx_path", "chat_template"}
NAMED_AT_MOST = 5


@dataclass(frozen=True)
class PackedFile:
    """One file to upload.

    Attributes:
        name: path below the folder, with forward slashes.
        size: bytes.
    """

    name: str
    size: int


def collect(root: Path) -> list[PackedFile]:
    """The files below a folder that a job uploads, ordered by name.

    Each `.gitignore` and `.rayignore` counts for its folder and what is below; a file that either names is left out.

    Args:
        root: the folder.

    Raises:
        PackageError: the folder is that of a run or lies in one, there are weights, run folders or links to folders
            among them, or they are too large.
    """
    whole = root.resolve()
    for folder in (whole, *whole.parents):
        if _is_run(folder):
            what = "is a run's directory" if folder == whole else f"lies in a run's directory, {folder}"
            raise PackageError(
                f"{whole}: {what}, and a job's upload would hold the run; submit from the folder of your code"
            )
    found: list[PackedFile] = []
    refused: list[str] = []
    try:
        _walk(root, "", {name: [] for name in IGNORE_FILES}, found, refused)
    except (OSError, ValueError) as error:
        raise PackageError(f"{root}: cannot be read: {error}; mend it or name it in .rayignore") from None
    if refused:
        raise PackageError(
            f"{root}: its upload would hold {_some(sorted(refused))}. Submit from another folder, or name these in "
            ".rayignore and let the job read what it needs by absolute paths on the cluster's shared file system"
        )
    found.sort(key=lambda file: file.name)
    _check_size(root, sum(file.size for file in found), found)
    return found


def write_package(root: Path, files: Sequence[PackedFile], config: str, target: Path) -> None:
    """Writes the archive that becomes the job's working directory.

    The same files and configuration give the same bytes, which the cluster then has already.

    Args:
        root: the folder that was collected.
        files: what `collect` found there.
        config: the resolved configuration; it lies in the archive as `CONFIG_NAME`.
        target: the archive to write.

    Raises:
        PackageError: a file cannot be read, or the archive is too large.
    """
    try:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            for file in files:
                info = zipfile.ZipInfo.from_file(root / file.name, file.name, strict_timestamps=False)
                info.date_time = (1980, 1, 1, 0, 0, 0)
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, (root / file.name).read_bytes())
            archive.writestr(zipfile.ZipInfo(CONFIG_NAME), config)
    except OSError as error:
        raise PackageError(f"{root}: cannot be packed for the upload: {error}; mend it and submit again") from None
    _check_size(root, target.stat().st_size, files)


def check_config(config: BaseModel, files: Sequence[PackedFile]) -> None:
    """Refuses a configuration that would mean something else in a job, whose working directory is a copy.

    Args:
        config: of a stage or a pipeline.
        files: what is uploaded.

    Raises:
        ConfigError: the run directory is relative, another cluster is named, or a relative path is not uploaded.
    """
    values = config.model_dump(mode="json")
    problems = []
    if not Path(values["run"]["dir"]).is_absolute():
        problems.append(
            f"run.dir: found {values['run']['dir']!r}, but a job's working directory is a copy that goes away; name an "
            "absolute path on the cluster's shared file system"
        )
    if values["run"]["ray_address"]:
        problems.append(
            f"run.ray_address: found {values['run']['ray_address']!r}, but a job runs on the cluster that it is "
            "submitted to; leave the key out"
        )
    uploaded = {file.name for file in files} | {
        str(folder) for file in files for folder in Path(file.name).parents if str(folder) != "."
    }
    problems += [
        f"{key}: found {name!r}, which is not in the upload; name an absolute path on the cluster's shared file system"
        for key, name in _named_paths(values)
        if not expanded(name).is_absolute()
        and (looks_local(name) or Path(name).exists())
        and posixpath.normpath(name) not in uploaded
    ]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems:\n" + "\n".join(f"  {problem}" for problem in problems))


def size_text(size: int) -> str:
    """Bytes as people write them."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def largest(files: Sequence[PackedFile]) -> list[str]:
    """The largest files with their sizes."""
    chosen = sorted(files, key=lambda file: (-file.size, file.name))[:NAMED_AT_MOST]
    return [f"{file.name} ({size_text(file.size)})" for file in chosen]


def _walk(
    root: Path,
    folder: str,
    specs: dict[str, list[tuple[str, GitIgnoreSpec]]],
    found: list[PackedFile],
    refused: list[str],
) -> None:
    """Adds the files below `folder` (relative, empty or with a slash at its end) to `found`, or their names and what
    is wrong with them to `refused`. `specs` are the ignore files from the root to here, of each kind.
    """
    here = root / folder
    specs = {name: [*known, *_ignore_spec(here / name, folder)] for name, known in specs.items()}
    for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
        name = folder + entry.name
        is_folder = entry.is_dir()
        if entry.name in NEVER_UPLOADED or name == CONFIG_NAME or _is_ignored(name + "/" * is_folder, specs):
            continue
        path = Path(entry.path)
        if is_folder and entry.is_symlink():
            refused.append(f"{name} (a link to a folder)")
        elif is_folder and _is_run(path):
            refused.append(f"{name} (a run)")
        elif is_folder:
            _walk(root, name + "/", specs, found, refused)
        elif entry.is_file():
            size = entry.stat().st_size
            if path.suffix in WEIGHT_SUFFIXES:
                refused.append(f"{name} (weights, {size_text(size)})")
            else:
                found.append(PackedFile(name, size))


def _is_run(folder: Path) -> bool:
    # Unlike pathlib's, these answer no where a folder above may not be looked into.
    return os.path.isfile(folder / "run.json") and os.path.isdir(folder / "checkpoints")


def _ignore_spec(path: Path, folder: str) -> list[tuple[str, GitIgnoreSpec]]:
    if not path.is_file():
        return []
    return [(folder, GitIgnoreSpec.from_lines(path.read_text(encoding="utf-8").splitlines()))]


def _is_ignored(name: str, specs: dict[str, list[tuple[str, GitIgnoreSpec]]]) -> bool:
    """Whether an ignore file of either kind names the path; of one kind, the nearest that says something decides."""
    for known in specs.values():
        for folder, spec in reversed(known):
            answer = spec.check_file(name.removeprefix(folder)).include
            if answer is not None:
                if answer:
                    return True
                break
    return False


def _named_paths(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key below `values` that names data, models or templates, with its value."""
    for key, value in values.items():
        named = prefix + key
        if isinstance(value, dict):
            yield from _named_paths(value, f"{named}.")
        elif key in PATH_KEYS:
            for name in value if isinstance(value, list) else [value]:
                if name and (key, name) != ("chat_template", "default"):
                    yield named, name
        elif isinstance(value, list) and key != "functions":
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _named_paths(item, f"{named}.{index}.")


def _check_size(root: Path, size: int, files: Sequence[PackedFile]) -> None:
    if size >= UPLOAD_LIMIT_BYTES:
        raise PackageError(
            f"{root}: its upload has {size_text(size)} and a cluster takes less than {size_text(UPLOAD_LIMIT_BYTES)}; "
            f"name in .rayignore what the job does not need. The largest files: {', '.join(largest(files))}"
        )


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
