"""What a data or model name in a configuration stands for: something on this machine, or something on the hub."""

from pathlib import Path

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


def looks_local(name: str) -> bool:
    """Whether the name can only be a path: it starts like one, has several parts, or ends like a data file."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in FILE_SUFFIXES


def is_hub_name(name: str) -> bool:
    """Whether the name is looked for on the hub: nothing on disk answers to it, and it can be no path."""
    return not looks_local(name) and not Path(name).expanduser().exists()
