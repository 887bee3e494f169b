"""Reading rows from JSON Lines, JSON, Parquet, folders of them and the Hugging Face hub.

Every row remembers where it came from (`file:line`), so that whatever is wrong with it later can be said of a
place that a person can open. No row disappears in silence: it is returned, or it is listed in `Rows.skipped`.

A file takes memory in proportion to its size, whatever is in it: what would take more is refused.
"""

import difflib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from rlhf_ray.errors import DataError, shortened
from rlhf_ray.names import FILE_SUFFIXES, expanded, is_hub_name

logger = logging.getLogger(__name__)

OnMalformed = Literal["error", "skip"]

FOLDER_SUFFIXES = (".jsonl", ".parquet")

# A line of JSON Lines; as Python values it can take thirty times as much.
LONGEST_LINE_BYTES = 16 * 2**20
# A .json file, which is read whole.
LARGEST_JSON_BYTES = 256 * 2**20
# Lists and objects in each other within one row. Python gives up at some hundred, on the way to another process too.
MOST_LEVELS = 100
# What the rows of a Parquet file may take unpacked: so much in any case, or so many times the size of the file.
UNPACKED_BYTES = 2**29
UNPACKED_RATIO = 1000
# What a row takes besides its values.
ROW_BYTES = 512
# Rows that are unpacked at a time: one, where values may be much larger than what is packed in the file.
BATCH_ROWS = 64
USUAL_RATIO = 20


@dataclass(frozen=True)
class Row:
    """One row and its place: `file:line`, or `file:row` where rows have no lines; both count from 1."""

    data: dict[str, Any]
    source: str


@dataclass(frozen=True)
class Malformed:
    """A row that could not be read: the message names its place and what is wrong with it."""

    message: str


class Rows(list[Row]):
    """The rows that were read, in order.

    Attributes:
        skipped: one message for each row that was left out.
    """

    def __init__(self, rows: list[Row] | None = None, skipped: list[str] | None = None):
        super().__init__(rows or [])
        self.skipped: list[str] = [] if skipped is None else skipped


@dataclass
class MalformedRows:
    """What becomes of rows that cannot be used: the first one raises, or each is kept as a message.

    Raises:
        DataError: from `add` with policy "error".
    """

    policy: OnMalformed
    messages: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        """Raises or keeps the message, as the policy says."""
        if self.policy == "error":
            raise DataError(f"{message}. Correct the row, or set `data.malformed` to `skip` to leave such rows out")
        self.messages.append(message)


def read_rows(
    path: str | list[str],
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    on_malformed: OnMalformed = "error",
) -> Rows:
    """Reads rows from files, folders or hub datasets, in the order in which they are named.

    Args:
        path: a `.jsonl`, `.json` (a list of objects) or `.parquet` file, a folder (all its `.jsonl` and
            `.parquet` files by name), a hub dataset name, or several of these.
        split: split to read of a hub dataset; files and folders are read whole.
        columns: column names that differ, ours to theirs: `{"prompt": "question"}` renames `question` to
            `prompt`.
        limit: readable rows to return at most; None returns all.
        on_malformed: "error" stops at the first row that cannot be read, "skip" lists it in `Rows.skipped`.

    Raises:
        DataError: nothing at the path, nothing in it, a malformed row under "error", or a mapped column that
            no row has.
    """
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise DataError("`data.path` is an empty list: name at least one file, folder or hub dataset")
    malformed = MalformedRows(on_malformed)
    rows = Rows(skipped=malformed.messages)
    for item in _read_all(paths, split):
        if isinstance(item, Malformed):
            malformed.add(item.message)
            continue
        rows.append(item)
        if limit is not None and len(rows) >= limit:
            break
    if not rows:
        where = ", ".join(paths)
        if rows.skipped:
            raise DataError(f"{where}: all {len(rows.skipped)} rows are malformed; the first: {rows.skipped[0]}")
        raise DataError(f"{where} holds no rows: name a file with at least one")
    if rows.skipped:
        logger.warning("%s: skipped %d malformed rows; the first: %s", paths, len(rows.skipped), rows.skipped[0])
    if columns:
        return Rows(_rename(rows, columns), rows.skipped)
    return rows


def _read_all(paths: list[str], split: str) -> Iterator[Row | Malformed]:
    for path in paths:
        for file in _expand(path):
            yield from _read_file(file) if isinstance(file, Path) else _read_hub(file, split)


def _expand(path: str) -> list[Path] | list[str]:
    """The files that a path stands for, or the hub name it is when nothing on disk answers to it."""
    location = expanded(path)
    if location.is_dir():
        return _data_files(location)
    if location.exists():
        return [_data_file(location)]
    if not is_hub_name(path):
        raise DataError(_missing(location))
    return [path]


def _data_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in FOLDER_SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"folder {folder} holds no {' or '.join(FOLDER_SUFFIXES)} file: name another folder")
    return files


def _data_file(file: Path) -> Path:
    if file.suffix not in FILE_SUFFIXES:
        raise DataError(
            f"{file} is neither {', '.join(FILE_SUFFIXES)} nor a folder: convert it to one of these, "
            "JSON Lines for instance"
        )
    if not file.is_file():  # one that is opened would be waited for
        raise DataError(f"{file} is a pipe or a device: copy what it gives into a file, and name that")
    return file


def _missing(location: Path) -> str:
    """Says that a file is missing, with the nearest name that its folder has."""
    parent = location.parent
    if not parent.is_dir():
        return f"{location} does not exist, nor does its folder {parent}: correct `data.path`"
    names = [entry.name for entry in parent.iterdir() if entry.suffix in FILE_SUFFIXES or entry.is_dir()]
    nearest = difflib.get_close_matches(location.name, names, n=1, cutoff=0.0)
    hint = f"did you mean {parent / nearest[0]}?" if nearest else f"{parent} holds no data file"
    return f"{location} does not exist; {hint}"


def _read_file(path: Path) -> Iterator[Row | Malformed]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {shortened(error, 500)}") from error


def _read_jsonl(path: Path) -> Iterator[Row | Malformed]:
    """Yields one row for each line that is not blank."""
    with path.open("rb") as file:
        # Bytes are split at newlines alone: text mode would also fail the whole file for one bad byte.
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE_BYTES + 1)
            if not line:
                return
            source = f"{path}:{number}"
            if len(line) > LONGEST_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE_BYTES)
                yield Malformed(f"{source}: longer than {LONGEST_LINE_BYTES} bytes; a line holds one row")
            elif line.strip():
                try:
                    yield _as_row(_load_json(line, source), source)
                except DataError as error:
                    yield Malformed(str(error))


def _load_json(content: bytes, source: str) -> Any:
    """Parses one JSON text.

    Raises:
        DataError: what is wrong with it and where.
    """
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start + 1} ({error.reason})") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: holds an unpaired surrogate escape, which is no character") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets nested as deep
        raise DataError(f"{source}: not usable JSON: {error}") from error
    return value


def _as_row(value: Any, source: str) -> Row | Malformed:
    if not isinstance(value, dict):
        return Malformed(f"{source}: expected a JSON object, found {type(value).__name__}")
    if _is_deep(value):
        return Malformed(f"{source}: nested deeper than {MOST_LEVELS} levels")
    return Row(value, source)


def _is_deep(value: Any) -> bool:
    """Whether lists and objects lie in each other more than `MOST_LEVELS` deep."""
    level = [value]
    for _ in range(MOST_LEVELS):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for values in inner for one in values if isinstance(one, dict | list)]
        if not level:
            return False
    return True


def _read_json(path: Path) -> Iterator[Row | Malformed]:
    """Yields the items of one JSON list."""
    if path.stat().st_size > LARGEST_JSON_BYTES:
        raise DataError(
            f"{path}: a .json file is read whole, and this one has more than {LARGEST_JSON_BYTES} bytes; convert it to "
            "JSON Lines, one object a line"
        )
    rows = _load_json(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: a .json file must hold one list of objects, found {type(rows).__name__}; one object a "
            "line belongs in a .jsonl file"
        )
    for number, value in enumerate(rows, start=1):
        yield _as_row(value, f"{path}:{number}")


def _read_parquet(path: Path) -> Iterator[Row | Malformed]:
    # What pyarrow raises for a damaged file is of many types, UnicodeDecodeError and OverflowError among them.
    packed = path.stat().st_size
    most = max(UNPACKED_BYTES, UNPACKED_RATIO * packed)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            declared = _declared(path, file.metadata, most)
            # A value is at most as large as its row group, which a file of text packs to a third or so.
            batch_rows = 1 if declared > USUAL_RATIO * max(packed, 2**16) else BATCH_ROWS
            number = unpacked = 0
            for batch in file.iter_batches(batch_size=batch_rows):
                unpacked += ROW_BYTES * batch.num_rows + sum(_size(column) for column in batch.columns)
                if unpacked > most:
                    raise DataError(_too_large(path, f"more than {unpacked} bytes"))
                for value in _values(batch):
                    number += 1
                    source = f"{path}:{number}"
                    if isinstance(value, Exception):
                        yield Malformed(f"{source}: cannot be read: {shortened(value, 500)}")
                    else:
                        yield _as_row(value, source)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read: {shortened(error, 500) or type(error).__name__}") from error


def _declared(path: Path, metadata: pyarrow.parquet.FileMetaData, most: int) -> int:
    """Bytes that a file says it unpacks to; refuses it, before anything is unpacked, where they are too many."""
    # Not column by column: pyarrow ends the whole process where a column's part of the metadata is damaged.
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if size > most:
        raise DataError(_too_large(path, f"{size} bytes"))
    if metadata.num_rows * ROW_BYTES > most:
        raise DataError(_too_large(path, f"{metadata.num_rows} rows"))
    return size


def _too_large(path: Path, amount: str) -> str:
    return (
        f"{path}: unpacks to {amount}, which is out of proportion to the {path.stat().st_size} bytes it has; it is "
        "damaged, or repeats a few values: write it anew without repetitions, or as JSON Lines"
    )


def _size(column: pyarrow.Array) -> int:
    """Bytes of a column's values; of one that names values of a dictionary, as if each row had a value of its own."""
    return column.dictionary_decode().nbytes if pyarrow.types.is_dictionary(column.type) else column.nbytes


def _values(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | Exception]:
    """The rows of a batch; in place of one that cannot be read, what is wrong with it."""
    try:
        yield from batch.to_pylist()
    except Exception:
        for i in range(batch.num_rows):
            try:
                yield from batch.slice(i, 1).to_pylist()
            except Exception as error:
                yield error


def _read_hub(name: str, split: str) -> Iterator[Row]:
    try:
        import datasets  # imported here because it takes seconds and local files need none of it

        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever goes wrong on the way to the hub, the user needs both halves of the story
        raise DataError(
            f"{name!r} is neither a file nor a folder, and loading it from the hub failed with "
            f"{type(error).__name__}: {shortened(error, 1000)}"
        ) from error
    for number, value in enumerate(dataset, start=1):
        yield Row(dict(value), f"{name}[{split}]:{number}")


def _rename(rows: Rows, columns: Mapping[str, str]) -> list[Row]:
    """Gives mapped columns our names; the other columns stay as they are."""
    found = {name for row in rows for name in row.data}
    for ours, theirs in columns.items():
        if theirs not in found:
            raise DataError(
                f"`data.columns` maps {ours!r} to column {theirs!r}, which no row of {rows[0].source} and "
                f"after has; columns found: {shortened(', '.join(sorted(map(str, found))), 500)}"
            )
    taken = set(columns.values())
    renamed = []
    for row in rows:
        data = {name: value for name, value in row.data.items() if name not in taken}
        data.update({ours: row.data[theirs] for ours, theirs in columns.items() if theirs in row.data})
        renamed.append(Row(data, row.source))
    return renamed
