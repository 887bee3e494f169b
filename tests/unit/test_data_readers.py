"""Reading rows: every format, every way in which a file can be wrong, and where it is wrong."""

import json
import os
import tempfile
from pathlib import Path

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data import readers
from rlhf_ray.data.readers import Row, read_rows
from rlhf_ray.errors import ConfigError, DataError


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
    return str(path)


def test_jsonl_rows_carry_file_and_line_and_blank_lines_are_no_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one\u2028line"}', "", '{"text": "two"}\r')
    assert read_rows(path) == [Row({"text": "one\u2028line"}, f"{path}:1"), Row({"text": "two"}, f"{path}:3")]


def test_last_line_needs_no_newline_and_a_byte_order_mark_is_dropped(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"n": 1}\n{"n": 2}')
    assert [row.data for row in read_rows(path)] == [{"n": 1}, {"n": 2}]


MALFORMED = [
    (b'{"a": 1\n', "not JSON: Expecting ',' delimiter"),
    (b"[1, 2]\n", "expected a JSON object, found list"),
    (b"null\n", "expected a JSON object, found NoneType"),
    (b'{"a": "\xff"}\n', "not UTF-8 at byte 8"),
    (b'{"a": "\\ud800"}\n', "unpaired surrogate"),
    (b'{"a": ' + b"9" * 5000 + b"}\n", "not usable JSON"),
    (b'{"a": ' + b"[" * 100_000 + b"\n", "not usable JSON"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED)
def test_malformed_line_stops_with_file_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", '{"a": 1}', line, '{"a": 2}')
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)
    assert "set `data.malformed` to `skip`" in str(caught.value)


@pytest.mark.parametrize(("line", "reason"), MALFORMED)
def test_malformed_line_is_skipped_and_told(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", '{"a": 1}', line, '{"a": 2}')
    rows = read_rows(path, on_malformed="skip")
    assert [row.data for row in rows] == [{"a": 1}, {"a": 2}]
    assert len(rows.skipped) == 1
    assert rows.skipped[0].startswith(f"{path}:2: ")
    assert reason in rows.skipped[0]


def test_file_of_malformed_rows_alone_is_an_error_under_skip_too(tmp_path):
    path = write(tmp_path / "a.jsonl", "nonsense", "[]")
    with pytest.raises(DataError, match=r"all 2 rows are malformed; the first: .*a\.jsonl:1: not JSON"):
        read_rows(path, on_malformed="skip")


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_empty_file_is_an_error(tmp_path, content):
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(path)


def test_json_list(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"a": 1}, 5, {"a": 2}], indent=1))
    rows = read_rows(path, on_malformed="skip")
    assert rows == [Row({"a": 1}, f"{path}:1"), Row({"a": 2}, f"{path}:3")]
    assert rows.skipped == [f"{path}:2: expected a JSON object, found int"]


@pytest.mark.parametrize(("content", "reason"), [('{"a": 1}', "must hold one list"), ('[{"a": 1}', "not JSON")])
def test_json_that_is_no_list_is_an_error_in_both_modes(tmp_path, content, reason):
    path = write(tmp_path / "a.json", content)
    for mode in ("error", "skip"):
        with pytest.raises(DataError, match=reason):
            read_rows(path, on_malformed=mode)


def test_parquet_round_trip_keeps_nested_messages(tmp_path):
    data: list[dict] = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bye"}], "n": 1},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "n": None},
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), path, row_group_size=1)
    assert read_rows(str(path)) == [Row(data[0], f"{path}:1"), Row(data[1], f"{path}:2")]


def test_broken_parquet_is_an_error_that_names_the_file(tmp_path):
    path = write(tmp_path / "a.parquet", "no parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        read_rows(path)


def test_folder_reads_its_files_by_name_and_paths_add_up(tmp_path):
    write(tmp_path / "b.jsonl", '{"n": 3}')
    write(tmp_path / "a.jsonl", '{"n": 1}', '{"n": 2}')
    write(tmp_path / "notes.txt", "not data")
    pyarrow.parquet.write_table(pyarrow.table({"n": [4]}), tmp_path / "c.parquet")
    assert [row.data["n"] for row in read_rows(str(tmp_path))] == [1, 2, 3, 4]
    several = read_rows([str(tmp_path / "b.jsonl"), str(tmp_path)])
    assert [row.data["n"] for row in several] == [3, 1, 2, 3, 4]


def test_folder_without_data_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=f"folder {tmp_path} holds no .jsonl or .parquet file"):
        read_rows(str(tmp_path))


def test_missing_file_names_the_nearest_there_is(tmp_path):
    write(tmp_path / "train.jsonl", '{"a": 1}')
    write(tmp_path / "zebra.jsonl", '{"a": 1}')
    with pytest.raises(DataError, match=r"does not exist; did you mean .*/train\.jsonl\?"):
        read_rows(str(tmp_path / "trian.jsonl"))


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=f"nor does its folder {tmp_path}/none"):
        read_rows(str(tmp_path / "none" / "train.jsonl"))


def test_unknown_file_type_names_the_known_ones(tmp_path):
    path = write(tmp_path / "a.csv", "a,b")
    with pytest.raises(DataError, match=r"neither \.jsonl, \.json, \.parquet nor a folder"):
        read_rows(path)


def test_no_path_at_all_is_an_error():
    with pytest.raises(DataError, match="empty list"):
        read_rows([])


def test_hub_failure_says_that_it_was_taken_for_a_hub_name(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="'nobody/nothing' is neither a file nor a folder, and loading it from"):
        read_rows("nobody/nothing")


def test_limit_counts_readable_rows_and_reads_no_further(tmp_path):
    path = write(tmp_path / "a.jsonl", "bad", '{"n": 1}', '{"n": 2}', "also bad")
    rows = read_rows(path, limit=2, on_malformed="skip")
    assert [row.data["n"] for row in rows] == [1, 2]
    assert len(rows.skipped) == 1


def test_columns_are_renamed_and_others_stay(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "q", "answer": "a", "id": 7}', '{"answer": "b"}')
    rows = read_rows(path, columns={"prompt": "question", "completion": "answer"})
    assert [row.data for row in rows] == [{"prompt": "q", "completion": "a", "id": 7}, {"completion": "b"}]


def test_columns_can_be_swapped(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"chosen": "x", "rejected": "y"}')
    rows = read_rows(path, columns={"chosen": "rejected", "rejected": "chosen"})
    assert rows[0].data == {"chosen": "y", "rejected": "x"}


def test_mapped_column_that_no_row_has_names_those_found(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "q"}', '{"answer": "a"}')
    with pytest.raises(DataError, match=r"maps 'prompt' to column 'query'.*columns found: answer, question"):
        read_rows(path, columns={"prompt": "query"})


def test_renaming_keeps_the_messages_of_skipped_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"q": "x"}', "bad")
    assert len(read_rows(path, columns={"prompt": "q"}, on_malformed="skip").skipped) == 1


JSONISH = st.one_of(
    st.binary(max_size=60),
    st.text('{}[]":,\\u0d8efalstrn19.-+ \n', max_size=40).map(str.encode),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3).map(lambda d: json.dumps(d).encode()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(JSONISH, max_size=5).map(b"\n".join), st.sampled_from(["error", "skip"]))
def test_random_bytes_give_rows_or_a_data_error(content, mode):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(content)
        try:
            rows = read_rows(str(path), on_malformed=mode)
        except DataError:
            return
        assert all(isinstance(row.data, dict) for row in rows)
        lines = sum(bool(line.strip()) for line in content.split(b"\n"))
        assert len(rows) + len(rows.skipped) == lines
        json.dumps([row.data for row in rows], ensure_ascii=False).encode()


# Faults that fuzzing found


def parquet_bytes(path, table, *changes, **options):
    """Writes a table as a Parquet file in which some bytes are others."""
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False, store_schema=False, **options)
    content = path.read_bytes()
    for old, new in changes:
        assert old in content and len(old) == len(new)
        content = content.replace(old, new)
    path.write_bytes(content)
    return str(path)


def test_parquet_row_that_is_not_utf8_is_malformed_and_the_others_are_read(tmp_path):
    table = pyarrow.table({"text": ["one", "two", "six"]})
    path = parquet_bytes(tmp_path / "a.parquet", table, (b"two", b"t\xe1o"), write_statistics=False)
    with pytest.raises(DataError, match=r"a\.parquet:2: cannot be read: 'utf-8' codec can't decode byte 0xe1"):
        read_rows(path)
    rows = read_rows(path, on_malformed="skip")
    assert rows == [Row({"text": "one"}, f"{path}:1"), Row({"text": "six"}, f"{path}:3")]
    assert len(rows.skipped) == 1


def test_parquet_column_name_that_is_not_utf8_is_an_error_that_names_the_file(tmp_path):
    path = parquet_bytes(tmp_path / "a.parquet", pyarrow.table({"text": ["one"]}), (b"text", b"\xf4ext"))
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: 'utf-8' codec can't decode byte 0xf4"):
        read_rows(path)


def test_parquet_with_damaged_column_metadata_does_not_end_the_process(tmp_path):
    """A column repeats where it did not, so that its statistics have the wrong number of levels."""
    table = pyarrow.Table.from_pylist([{"messages": [{"role": "user", "content": "Hi"}]}])
    path = parquet_bytes(tmp_path / "a.parquet", table, (b"%\x02\x18\x04role", b"%\x08\x18\x04role"))
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: Definition level histogram size mismatch"):
        read_rows(path)


def test_parquet_that_unpacks_out_of_proportion_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "UNPACKED_BYTES", 100 * readers.ROW_BYTES)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": pyarrow.repeat(1, 1_000_000)}), path)
    size = path.stat().st_size
    with pytest.raises(DataError, match=rf"a\.parquet: unpacks to 1000000 rows, which is out of .* the {size} bytes"):
        read_rows(str(path))


def test_line_that_is_too_long_is_malformed_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE_BYTES", 20)
    path = write(tmp_path / "a.jsonl", '{"n": 1}', json.dumps({"n": "x" * 50}), '{"n": 2}', '{"n": "1234567890"}')
    rows = read_rows(path, on_malformed="skip")
    assert rows == [Row({"n": 1}, f"{path}:1"), Row({"n": 2}, f"{path}:3"), Row({"n": "1234567890"}, f"{path}:4")]
    assert rows.skipped == [f"{path}:2: longer than 20 bytes; a line holds one row"]


def test_json_file_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_JSON_BYTES", 10)
    with pytest.raises(DataError, match=r"this one has more than 10 bytes; convert it to JSON Lines"):
        read_rows(write(tmp_path / "a.json", '[{"a": 1}, {"a": 2}]'))


@pytest.mark.parametrize(("levels", "reason"), [(100, None), (101, "nested deeper than 100 levels")])
def test_row_that_is_nested_too_deep_is_malformed(tmp_path, levels, reason):
    path = write(tmp_path / "a.jsonl", '{"a":' * levels + "1" + "}" * levels, '{"a": 1}')
    rows = read_rows(path, on_malformed="skip")
    assert (len(rows), rows.skipped) == ((2, []) if reason is None else (1, [f"{path}:1: {reason}"]))


def test_mapped_column_that_no_row_has_names_some_of_very_many(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({f"column{i}": 1 for i in range(10_000)}))
    with pytest.raises(DataError, match=r"columns found: column0, .*\.\.\.$") as caught:
        read_rows(path, columns={"prompt": "query"})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("x" * 300 + ".jsonl", "File name too long"),
        ("x" * 300, "File name too long"),
        ("~no-such-user/a.jsonl", "Could not determine home directory"),
    ],
)
def test_path_that_no_file_can_have_is_an_error(path, reason):
    with pytest.raises(ConfigError, match=rf"names no file or folder that can be looked up \(.*{reason}"):
        read_rows(path)


def test_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl is a pipe or a device: copy what it gives into a file"):
        read_rows(str(tmp_path / "a.jsonl"))
