"""Names of data and models: what a name in a configuration stands for, and where a stage leaves its model."""

from pathlib import Path

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


def looks_local(name: str) -> bool:
    """Whether the name can only be a path: it starts like one, has several parts, or ends like a data file."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in FILE_SUFFIXES


def is_hub_name(name: str) -> bool:
    """Whether the name is looked for on the hub: nothing on disk answers to it, and it can be no path."""
    return not looks_local(name) and not Path(name).expanduser().exists()


def on_disk(name: str) -> str:
    """The name by its absolute path where it is a folder here, so that processes that work elsewhere find it."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def model_folder(run_dir: str | Path) -> Path:
    """Where a stage with this run directory leaves its model."""
    return Path(run_dir) / "model"
