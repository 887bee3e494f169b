"""What the fuzz tests share: damage to valid files, and what a reader may do with a damaged one.

A reader may read a file, or refuse it with an `RlhfError` that names the file in a message of bounded length. Anything
else that it raises is a fault, and so is more than `SECONDS` of processor time.
"""

import logging
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import RlhfError

# Of processor time, which other work on the machine does not use up. Inputs have some hundred kilobytes at most.
SECONDS = 5.0
LONGEST_MESSAGE = 10_000
# How far the resident memory of this process may rise over all inputs of a test.
MEMORY_BYTES = 512 * 2**20

# What stands in files that were written by other programs, by other systems, or to do harm.
NASTY = [
    *(b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\r\n", b"\r"),
    *(
        b"\n\n",
        b"\t",
        b"\x1b[2J",
        "\u2028".encode(),
        "\u202e".encode(),
        b"\xc2\x85",
        b"\\",
        b'"',
        b"'",
        b"`",
        b"{",
        b"[",
    ),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-1",
        b"0",
        b"-0.0",
        b"1e308",
        b"9" * 25,
        b"9" * 400,
        b"9" * 5000,
        b"0x" + b"f" * 5000,
    ),
    *(b"null", b"true", b"[]", b"{}", b'""', b'" "', b'"\\ud800"', b'"\\u0000"', b'"\\U00110000"', b"[[]]", b'{"":{}}'),
    *(b"[" * 300, b"[" * 3000, b"[" * 400 + b"]" * 400, b"[" * 3000 + b"]" * 3000, b'{"a":' * 3000, b"x" * 20_000),
    *(b"&a ", b"*a", b"&a [*a]", b"&a {b: *a}", b"<<: *a", b"!!timestamp 2001-99-99", b"!!binary x", b"!!int x"),
    *(b"!!float ''", b"!!bool x", b"!!set {x}", b"!!omap [a: 1]", b"!!python/name:os.system", b"!x y", b"? ", b"- "),
    *(b"---\n", b"...\n", b"%YAML 9.9\n", b"#", b": ", b"|\n", b">+9\n", b"2001-01-01", b"1_000", b".nan", b".inf"),
    *(b'"../../outside"', b'"/etc/hostname"', b'"~nobody/x"', b'"a/../../b"', "'\u00b2'".encode(), "\u0663".encode()),
]
_TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|[-+.\w]+|[\[\]{}]')


class TookTooLong(BaseException):
    """A reader used more processor time than it may; no `except Exception` of a reader stops it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises `TookTooLong` in the block after so much processor time."""

    def stop(*_: object) -> None:
        raise TookTooLong(f"more than {seconds:g} s of processor time")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def outcome(read: Callable[[], Any], names: str) -> str:
    """Reads, and says what came of it: "read", or the name of the error.

    Args:
        read: the reader with its file.
        names: what an error's message must name.
    """
    with limited(SECONDS):
        try:
            read()
        except RlhfError as error:
            check_message(str(error), names)
            return type(error).__name__
    return "read"


def check_message(message: str, names: str) -> None:
    """A message says something, of this file, that can be printed, and not without end."""
    assert message.removeprefix(names).strip(" :\n"), "an empty message"
    assert names in message
    assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters"
    message.encode()


def damaged(samples: list[bytes]) -> st.SearchStrategy[bytes]:
    """Valid files with one or two damages each: more hide each other."""
    place = st.integers(0, 2**16 - 1)
    # Numbers rather than the samples themselves: hypothesis prints what it chooses from.
    damages = st.tuples(st.integers(0, len(DAMAGES) - 1), place, place, st.integers(0, len(NASTY) - 1))

    def apply(sample: int, chosen: list[tuple[int, int, int, int]]) -> bytes:
        content = samples[sample]
        for kind, first, second, nasty in chosen:
            content = DAMAGES[kind](content, first, second, NASTY[nasty])
        return content

    return st.builds(apply, st.integers(0, len(samples) - 1), st.lists(damages, min_size=1, max_size=2))


def hostile(samples: list[bytes]) -> st.SearchStrategy[bytes]:
    """Damaged files, random bytes and what is nasty, in one stream."""
    nasty = st.lists(st.integers(0, len(NASTY) - 1).map(NASTY.__getitem__) | st.binary(max_size=8), max_size=8)
    spoilt = damaged(samples)
    return spoilt | spoilt | spoilt | spoilt | st.binary(max_size=200) | nasty.map(b"".join)


def _at(content: bytes, place: int) -> int:
    """A position of the content, in its last 256 bytes for every other place: footers are there."""
    size = len(content)
    tail = min(size, 256)
    return (size - tail + place // 2 % (tail + 1)) if place % 2 else place * size >> 16


def _flip(content: bytes, first: int, second: int, nasty: bytes) -> bytes:
    at = min(_at(content, first), len(content) - 1)
    return content[:at] + bytes([content[at] ^ (1 << second % 8)]) + content[at + 1 :] if content else content


def _set(content: bytes, first: int, second: int, nasty: bytes) -> bytes:
    at = min(_at(content, first), len(content) - 1)
    return content[:at] + bytes([second % 256]) + content[at + 1 :] if content else content


def _cut_end(content: bytes, first: int, second: int, nasty: bytes) -> bytes:
    return content[: _at(content, first)]


def _cut_part(content: bytes, first: int, second: int, nasty: bytes) -> bytes:
    at = _at(content, first)
    return content[:at] + content[at + 1 + second % 64 :]


def _double_part(content: bytes, first: int, second: int, nasty: bytes) -> bytes:
    at = _at(content, first)
    return content[:at] + content[at : at + 1 + second % 64] + content[at:]


def _insert(content: bytes, first: int, second: int, nasty: bytes) -> bytes:
    at = _at(content, first)
    return content[:at] + nasty + content[at:]


def _replace_token(content: bytes, first: int, second: int, nasty: bytes) -> bytes:
    """A wrong type or value where a whole one was, so that the file around it can still be parsed."""
    tokens = list(_TOKEN.finditer(content))
    if not tokens:
        return nasty
    token = tokens[first % len(tokens)]
    return content[: token.start()] + nasty + content[token.end() :]


def _lines(content: bytes, first: int, second: int, nasty: bytes) -> bytes:
    """A line is left out, doubled, put elsewhere, or all end as on another system."""
    lines = content.splitlines(keepends=True)
    if not lines:
        return content
    line = lines.pop(first % len(lines))
    if second % 4 == 0:
        return b"".join(lines)
    if second % 4 == 1:
        return b"".join([*lines, line])
    if second % 4 == 2:
        return b"".join([*lines[: second % (len(lines) + 1)], line, line, *lines[second % (len(lines) + 1) :]])
    return content.replace(b"\n", b"\r\n")


DAMAGES = [_flip, _flip, _set, _cut_end, _cut_part, _double_part, _insert, _replace_token, _replace_token, _lines]


def amounts(short: int, long: int) -> list[Any]:
    """The numbers of inputs of a test: few in the ordinary suite, many in the long one."""
    return [pytest.param(short, id="short"), pytest.param(long, id="long", marks=[pytest.mark.long, LONG_TIMEOUT])]


LONG_TIMEOUT = pytest.mark.timeout(3600)


def fuzz(what: str, inputs: st.SearchStrategy[Any], number: int, check: Callable[[Any], str]) -> None:
    """Gives `number` inputs to a check that says what came of each, and prints the figures of the whole."""
    seen: Counter[str] = Counter()

    @settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def run(one: Any) -> None:
        seen[check(one)] += 1

    memory, start = _peak_bytes(), time.process_time()
    logging.disable()  # pytest keeps every warning of a test
    try:
        run()
    finally:
        logging.disable(logging.NOTSET)
    grown = _peak_bytes() - memory
    outcomes = ", ".join(f"{count} {name}" for name, count in seen.most_common())
    seconds = time.process_time() - start
    print(f"{what}: {seen.total()} inputs ({outcomes}) in {seconds:.0f} s, peak memory +{grown / 2**20:.0f} MiB")
    assert seen.total() >= number
    assert grown <= MEMORY_BYTES
    assert number < 1000 or 0 < seen["read"] < seen.total(), "inputs that are all read or all refused show little"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def put(path: Path, content: bytes) -> Path:
    """Writes a file."""
    path.write_bytes(content)
    return path
