"""Damaged and hostile data files: read, or refused with a message that names the file; nothing else.

The long form (`make test-long PYTEST_ARGS="-k fuzz -rP"`) prints how many inputs it tried, and what they took.
"""

import datetime
import decimal
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import amounts, check_message, fuzz, hostile, outcome, put
from hypothesis import strategies as st

from rlhf_ray.data.formats import parse_demonstrations, parse_preferences, parse_prompts
from rlhf_ray.data.readers import Row, read_rows

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
DATA: list[dict[str, Any]] = [
    {"messages": [USER, REPLY]},
    {"prompt": "The sky is", "completion": " blue.", "weight": 1.5, "n": None},
    {"prompt": [USER], "completion": [REPLY], "tools": [{"name": "a", "arguments": {"b": [1, 2.5, True]}}]},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"text": "\n\nHuman: Hi\n\nAssistant: Hello."},
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " a kind of soup.", "weight": 2, "margin": 0.5},
    {"chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "Go away."}]},
    {"chosen": "The sky is blue.", "rejected": "The sky is a soup."},
    {"prompt": "The sky is", "completions": [" blue.", " green.", " a soup."], "ranks": [1, 2, 2]},
    {"text": "grüße \u2028 \U0001f600"},
]
JSONL = b"".join(json.dumps(row, ensure_ascii=number % 2 == 0).encode() + b"\n" for number, row in enumerate(DATA))
JSON = json.dumps(DATA, indent=1).encode()


def parquet(table: pyarrow.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, **options)
    return sink.getvalue()


def parquet_samples() -> list[bytes]:
    """Small tables of every kind of column, plain and encoded, so that a flipped bit often meets something."""
    plain = pyarrow.table({"prompt": ["a b", "c", None], "completion": ["d", "e", "f"], "n": [1, None, 3]})
    chats = pyarrow.Table.from_pylist([{"messages": [USER, REPLY]}, {"messages": [USER, REPLY | {"name": "x"}]}] * 3)
    noon = datetime.datetime(2020, 1, 1, 12)
    odd = pyarrow.table(
        {
            "text": ["a", "b"],
            "nothing": pyarrow.nulls(2),
            "at": pyarrow.array([noon, None], pyarrow.timestamp("ns", "UTC")),
            "day": pyarrow.array([noon.date(), None]),
            "price": pyarrow.array([decimal.Decimal("1.50"), None]),
            "raw": pyarrow.array([b"\xff", None]),
            "map": pyarrow.array([[("k", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "half": pyarrow.array([1.5, None], pyarrow.float16()),
            "time": pyarrow.array([noon.time(), None]),
            "category": pyarrow.array(["x", "y"]).dictionary_encode(),
        }
    )
    tables = [plain, chats, odd]
    samples = [parquet(table, compression=kind) for table in tables for kind in ("none", "snappy", "zstd")]
    samples += [parquet(table, use_dictionary=False, write_statistics=False, compression="none") for table in tables]
    return [*samples, parquet(plain, row_group_size=1, version="1.0", data_page_version="2.0", store_schema=False)]


COLUMNS = ["messages", "prompt", "completion", "instruction", "input", "output", "text", "chosen", "rejected"]
COLUMNS += ["completions", "replies", "ranks", "weight", "margin", "tools", "n", "", "\x00", "x" * 300]
PARSERS = (parse_demonstrations, parse_preferences, parse_prompts)


def rows_of_any_kind() -> st.SearchStrategy[bytes]:
    """JSON Lines of known columns that hold anything."""
    text = st.text(max_size=4) | st.sampled_from(
        ["Hi", " ", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman:\n\nAssistant:"]
    )
    single = st.none() | st.booleans() | st.integers() | st.floats() | text
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", ""]) | single, "content": text}
    )
    value = (
        single
        | st.lists(single, max_size=4)
        | st.lists(message, max_size=3)
        | st.recursive(single, st.lists, max_leaves=4)
    )
    row = st.dictionaries(st.sampled_from(COLUMNS), value, max_size=5)
    return st.lists(row.map(lambda row: json.dumps(row).encode()), max_size=3).map(b"\n".join)


def check_file(path: Path) -> str:
    """Reads a file, and its rows as every kind of data; whatever was read can be written again."""

    def read() -> None:
        rows.extend(read_rows(str(path), on_malformed="skip"))

    def read_and_parse() -> None:
        parse(read_rows(str(path)), as_chat=as_chat)

    rows: list[Row] = []
    found = outcome(read, str(path))
    json.dumps([row.data for row in rows], ensure_ascii=False, default=str).encode()
    for parse, as_chat in itertools.product(PARSERS, (False, True)):
        items, skipped = parse(rows, as_chat=as_chat, on_malformed="skip")
        for message in skipped:
            check_message(message, str(path))
        assert items or skipped or not rows
        outcome(read_and_parse, str(path))
    return found


SAMPLES = {".jsonl": [JSONL, *JSONL.splitlines(keepends=True)], ".json": [JSON], ".parquet": parquet_samples()}


@pytest.mark.parametrize("suffix", SAMPLES)
@pytest.mark.parametrize("number", amounts(short=200, long=20_000))
def test_a_damaged_file_is_read_or_refused(suffix, number, tmp_path):
    path = tmp_path / f"a{suffix}"
    fuzz(suffix, hostile(SAMPLES[suffix]), number, lambda content: check_file(put(path, content)))


@pytest.mark.parametrize("number", amounts(short=200, long=20_000))
def test_columns_that_hold_anything_are_read_or_refused(number, tmp_path):
    path = tmp_path / "a.jsonl"
    fuzz("columns", rows_of_any_kind(), number, lambda content: check_file(put(path, content)))
