"""Small files that ask for much: time and memory stay within bounds, and each is refused in words.

The files are read in a process of their own, whose peak memory is theirs.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_ray.config.load import load_any
from rlhf_ray.data.formats import parse_preferences, parse_prompts
from rlhf_ray.data.readers import read_rows
from rlhf_ray.driver.checkpoint import damage
from rlhf_ray.errors import RlhfError

MIB = 2**20
GIB = 2**30
# Of the process that reads all of them, above what it has after its imports, and of processor time for one file.
MEMORY_MIB = 1024
SECONDS = 10.0


def sparse(path: Path, size: int) -> None:
    """A file of so many zeros, which takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(size)


def aliases(path: Path) -> None:
    """Ten to the power of nine values in ten lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    path.write_text("\n".join([*lines, "run: {dir: *a8}", "sft: {}"]))


def chained(path: Path) -> None:
    """Lists in lists a thousand deep, and no line with more than one bracket."""
    path.write_text("a0: &a0 []\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 1000)))


def many_keys(path: Path) -> None:
    path.write_text("sft:\n" + "".join(f"  lerning_rate_{i}: 1\n" for i in range(8000)))


def long_names(path: Path) -> None:
    path.write_text(f"sft:\n  ? {'x' * 100_000}\n  : 1\nrun: {{dir: [{'z' * 100_000}]}}\n")


def wide(path: Path) -> None:
    path.write_bytes(b'{"a":[' + b"[]," * (MIB // 2) + b"[]]}\n")


def ranking(path: Path) -> None:
    row = {"prompt": "p", "completions": [f" {i}" for i in range(5000)], "ranks": list(range(5000))}
    path.write_text(json.dumps(row) + "\n")


def transcript(path: Path) -> None:
    text = "\n\nHuman: x" * 200_000 + "\n\nAssistant: y"
    path.write_text(json.dumps({"chosen": text, "rejected": text + "z"}) + "\n")


def repeated_rows(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"n": pyarrow.repeat(1, 2_000_000)}), path, compression="zstd")


def repeated_value(path: Path) -> None:
    """A text of 4 MiB that a hundred thousand rows have, packed once."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.repeat(0, 100_000).cast("int32"), ["y" * 4 * MIB])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd")


def large_values(path: Path) -> None:
    """Each value other than the others, and of one letter for all but its beginning."""
    texts = pyarrow.array([f"{i}" + "y" * 16 * MIB for i in range(6)])
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), path, compression="zstd", use_dictionary=False, write_statistics=False
    )


def large_file(path: Path) -> None:
    sparse(path, 2 * GIB)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "aliases.yaml": (aliases, "more than 100000 values, with those that aliases repeat"),
    "chained.yaml": (chained, "nested deeper than 50 levels"),
    "endless.yaml": (lambda path: path.write_text("a: &a [*a]"), "an alias of what it stands in, which has no end"),
    "deep.yaml": (lambda path: path.write_text("[" * 100_000), "nested deeper than 50 levels"),
    "many_keys.yaml": (many_keys, "8002 problems:"),
    "long_names.yaml": (long_names, "unknown key"),
    "large.yaml": (large_file, "holds more than 262144 characters"),
    "device.yaml": (lambda path: path.symlink_to("/dev/zero"), "holds more than 262144 characters"),
    "deep.jsonl": (lambda path: path.write_bytes(b"[" * 15 * MIB), "not usable JSON: maximum recursion depth"),
    "levels.jsonl": (lambda path: path.write_bytes(b'{"a":' * 200 + b"1" + b"}" * 200), "deeper than 100 levels"),
    "large.jsonl": (lambda path: sparse(path, 100 * MIB), ":1: longer than 16777216 bytes; a line holds one row"),
    "wide.jsonl": (wide, "no preference in columns a"),
    "device.jsonl": (lambda path: path.symlink_to("/dev/zero"), "is a pipe or a device"),
    "pipe.jsonl": (os.mkfifo, "is a pipe or a device"),
    "ranking.jsonl": (ranking, "has 5000 replies; rank 256 at most"),
    "transcript.jsonl": (transcript, ""),
    "large.json": (large_file, "a .json file is read whole, and this one has more than 268435456 bytes"),
    "repeated_rows.parquet": (repeated_rows, "unpacks to 2000000 rows, which is out of proportion"),
    "repeated_value.parquet": (repeated_value, "bytes, which is out of proportion to the"),
    "large_values.parquet": (large_values, "no preference in columns text"),
    "large.parquet": (large_file, "Parquet magic bytes not found in footer"),
    "large.manifest": (large_file, "its manifest has more than 16777216 bytes"),
    "device.manifest": (lambda path: path.symlink_to("/dev/zero"), "its manifest is no file"),
    "pipe.manifest": (os.mkfifo, "its manifest is no file"),
    "deep.manifest": (lambda path: path.write_bytes(b"[" * 15 * MIB), "RecursionError"),
}


def read(path: Path) -> None:
    if path.suffix == ".yaml":
        load_any(path, [])
    elif path.suffix == ".manifest":
        folder = path.with_suffix("") / "step_000001"
        folder.mkdir(parents=True)
        path.rename(folder / "manifest.json")
        raise RlhfError(f"{path}: {damage(folder)}")
    else:
        rows = read_rows(str(path))
        parse_prompts(rows, on_malformed="skip")
        parse_preferences(rows)


def read_all(folder: Path) -> None:
    """Reads every file of a folder and prints what came of it, a line of JSON each."""
    before = peak_mib()
    for path in sorted(folder.iterdir()):
        start = time.process_time()
        try:
            read(path)
            message = ""
        except RlhfError as error:
            message = str(error)
        seconds = time.process_time() - start
        told = {"name": path.name, "message": message, "seconds": seconds, "peak_mib": peak_mib() - before}
        print(json.dumps(told), flush=True)


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("hostile")
    for name, (write, _) in HOSTILE.items():
        write(folder / name)
    command = [sys.executable, __file__, str(folder)]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {told["name"]: told for told in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_words_and_in_time(name, outcomes):
    told, expected = outcomes[name], HOSTILE[name][1]
    assert expected in told["message"]
    assert bool(told["message"]) == bool(expected)
    assert name in told["message"] or not expected
    assert len(told["message"]) < 10_000
    assert told["seconds"] < SECONDS


def test_hostile_files_take_bounded_memory(outcomes):
    assert len(outcomes) == len(HOSTILE)
    assert max(told["peak_mib"] for told in outcomes.values()) < MEMORY_MIB


if __name__ == "__main__":
    read_all(Path(sys.argv[1]))
