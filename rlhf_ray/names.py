"""Names of data and models: what a name in a configuration stands for, and where a stage leaves its model."""

from pathlib import Path

from rlhf_ray.errors import ConfigError, shortened

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


def looks_local(name: str) -> bool:
    """Whether the name can only be a path: it starts like one, has several parts, or ends like a data file."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in FILE_SUFFIXES


def is_hub_name(name: str) -> bool:
    """Whether the name is looked for on the hub: nothing on disk answers to it, and it can be no path."""
    try:
        return not looks_local(name) and not Path(name).exists()
    except OSError:  # too long for a name, of either kind
        return False


def expanded(name: str) -> Path:
    """The path that a name in a configuration is, with `~` written out; whether anything is there or not.

    Raises:
        ConfigError: no file could have it.
    """
    try:
        # pathlib drops the `./` of `./~`, which is no home.
        path = Path(name).expanduser() if name.startswith("~") else Path(name)
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, behind a folder that may not be read, `~` of no known user
        raise ConfigError(
            f"{shortened(name)!r} names no file or folder that can be looked up ({shortened(error)}): correct the path"
        ) from error
    return path


def on_disk(name: str) -> str:
    """The name by its absolute path where it is a folder here, so that processes that work elsewhere find it."""
    folder = expanded(name)
    return str(folder.absolute()) if folder.is_dir() else name


def model_folder(run_dir: str | Path) -> Path:
    """Where a stage with this run directory leaves its model."""
    return Path(run_dir) / "model"
