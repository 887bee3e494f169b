"""Damaged and hostile checkpoints: whole, or damaged in words; and nothing outside their folder is read or removed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from fuzzing import amounts, check_message, fuzz, hostile, outcome, put
from hypothesis import strategies as st

from rlhf_ray.data.ordering import EpochOrder
from rlhf_ray.driver import checkpoint
from rlhf_ray.driver.checkpoint import Checkpoint, CheckpointStore, damage

STATE = json.dumps({"order": {"epoch": 0, "position": 30, "seed": 0, "num_items": 50}, "kl": 0.1}).encode()


def entry(content: bytes) -> list[Any]:
    return [len(content), hashlib.sha256(content).hexdigest()]


@pytest.fixture
def step(tmp_path):
    """A whole checkpoint, with a file beside it that its manifest could name."""

    put(tmp_path / "outside", b"outside")
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    work = store.prepare(3)
    (work / "trainer").mkdir()
    put(work / "trainer" / "weights.bin", b"weights")
    folder = store.seal(3, json.loads(STATE))
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "up").symlink_to(tmp_path)
    return folder


def check(folder: Path) -> str:
    """What `damage` and `latest` say of the only checkpoint there is agrees."""
    store = CheckpointStore(folder.parent, keep=3)
    problems: list[str | None] = []
    outcome(lambda: problems.append(damage(folder)), "")
    found = outcome(store.latest, str(folder.parent))
    assert problems and (problems[0] is None) == (found == "read")
    if problems[0] is not None:
        check_message(problems[0], "")
    return found


def names_of_any_kind(outside: str) -> st.SearchStrategy[str]:
    odd = ["", ".", "..", "/", "~", "../outside", "trainer/../../../outside", outside, "link", "up/outside", "trainer"]
    odd += ["\x00", "a\x00b", "x" * 300, "x/" * 3000, "\ud800", "trainer//weights.bin", "./state.json", "/etc/hostname"]
    return st.sampled_from(["state.json", "trainer/weights.bin", *odd]) | st.text(max_size=4)


@pytest.mark.parametrize("number", amounts(short=300, long=10_000))
def test_a_damaged_manifest_is_whole_or_refused(number, step):
    manifest = step / "manifest.json"
    fuzz("manifest", hostile([manifest.read_bytes()]), number, lambda one: (put(manifest, one), check(step))[1])


@pytest.mark.parametrize("number", amounts(short=200, long=10_000))
def test_a_manifest_of_anything_reads_nothing_outside_its_folder(number, step, tmp_path, monkeypatch):
    """Sizes and checksums fit the files, wherever these are, so that the names alone tell right from wrong."""
    opened: list[Path] = []
    checksum = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: (opened.append(path), checksum(path))[1])

    def about(name: str) -> list[Any]:
        try:
            return entry((step / name).read_bytes())
        except (OSError, ValueError):
            return entry(b"")

    names = st.lists(names_of_any_kind(str(tmp_path / "outside")), max_size=2)
    right = names.map(lambda more: {name: about(name) for name in ["state.json", *more]})
    anything = st.recursive(st.none() | st.integers() | st.floats() | st.text(max_size=3), st.lists, max_leaves=4)
    wrong = st.fixed_dictionaries({"state.json": anything}) | anything
    manifests = st.fixed_dictionaries({"step": st.just(3), "files": right | right | right | wrong})
    manifests |= st.fixed_dictionaries({"step": anything, "files": right})

    def judge(manifest: dict[str, Any]) -> str:
        opened.clear()
        put(step / "manifest.json", json.dumps(manifest).encode())
        found = check(step)
        assert all(path.resolve().is_relative_to(step) for path in opened), opened
        return found

    fuzz("manifest's names", manifests, number, judge)


@pytest.mark.parametrize("number", amounts(short=200, long=10_000))
def test_a_damaged_state_with_the_right_checksum_is_an_object_or_refused(number, step):
    def judge(content: bytes) -> str:
        put(step / "state.json", content)
        put(step / "manifest.json", json.dumps({"step": 3, "files": {"state.json": entry(content)}}).encode())
        return check(step)

    fuzz("state", hostile([STATE]), number, judge)


@pytest.mark.parametrize("number", amounts(short=100, long=4_000))
def test_an_order_continues_from_any_state_or_refuses_it(number, step):
    """A position beyond the end would be looked for without end."""
    value = st.none() | st.integers() | st.integers(0, 60) | st.floats() | st.text(max_size=3) | st.lists(st.integers())
    keys = {"epoch": st.integers(0, 3) | value, "position": st.integers(0, 60) | value}
    states = st.fixed_dictionaries({**keys, "seed": st.just(0), "num_items": st.just(50)})
    states |= st.dictionaries(st.sampled_from(["epoch", "position", "seed", "num_items"]), value)
    found = Checkpoint(3, step, {})

    def judge(state: dict[str, Any]) -> str:
        def restore() -> None:
            with found.restoring():
                order.load_state_dict(state)
            assert len(order.next(60)) == 60

        order = EpochOrder(50, seed=0)
        return outcome(restore, "")

    fuzz("order", states, number, judge)
