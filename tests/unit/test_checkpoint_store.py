"""Checkpoints on disk: whole or not there, and what is left after damage."""

import hashlib
import json
import math
import os

import pytest

from rlhf_ray.data.ordering import EpochOrder
from rlhf_ray.driver.checkpoint import CheckpointStore, damage
from rlhf_ray.errors import CheckpointError


def write(store: CheckpointStore, step: int, score: float | None = None) -> None:
    folder = store.prepare(step)
    (folder / "trainer").mkdir()
    (folder / "trainer" / "weights.bin").write_bytes(bytes([step % 256]) * 1000)
    store.seal(step, {"position": step * 10}, score)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_newest_checkpoint_is_found_with_its_state(tmp_path):
    store = CheckpointStore(tmp_path, keep=5)
    assert store.latest() is None
    for step in (10, 20, 30):
        write(store, step)
    found = CheckpointStore(tmp_path, keep=5).latest()
    assert (found.step, found.state, found.folder) == (30, {"position": 300}, tmp_path / "step_000030")
    assert (found.folder / "trainer" / "weights.bin").read_bytes() == bytes([30]) * 1000
    assert damage(found.folder) is None


def test_manifest_names_every_file_with_size_and_checksum(tmp_path):
    write(CheckpointStore(tmp_path, keep=1), 7)
    manifest = json.loads((tmp_path / "step_000007" / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["files"].keys() == {"state.json", "trainer/weights.bin"}
    assert manifest["files"]["trainer/weights.bin"] == [
        1000,
        # head -c 1000 /dev/zero | tr '\0' '\7' | sha256sum
        "df1329c8b6c7cf3740bbe2f8bab34d253a8d9534a79dceea18177081fdf9f0e9",
    ]


def test_only_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        write(store, step)
    assert names(tmp_path) == ["step_000003", "step_000004"]


def test_the_best_is_kept_besides_and_known_after_a_restart(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.5), (4, math.nan), (5, None)):
        write(store, step, score)
    assert names(tmp_path) == ["step_000002", "step_000004", "step_000005"]
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest().step == 5
    write(store, 6, 0.9)
    assert names(tmp_path) == ["step_000005", "step_000006"]
    write(store, 7, 0.2)
    write(store, 8, 0.2)
    assert names(tmp_path) == ["step_000006", "step_000007", "step_000008"]


def test_what_will_not_be_sealed_is_swept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    (store.prepare(1) / "half").write_text("half")
    store.discard(1)
    store.discard(2)
    assert names(tmp_path) == []


def test_steps_of_seven_digits_are_newer_than_those_of_six(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (999_998, 999_999, 1_000_000):
        write(store, step)
    assert names(tmp_path) == ["step_1000000", "step_999999"]
    assert store.latest().step == 1_000_000


def flip(folder):
    file = folder / "trainer" / "weights.bin"
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)


def truncate(folder):
    file = folder / "trainer" / "weights.bin"
    file.write_bytes(file.read_bytes()[:-1])


def delete_file(folder):
    (folder / "trainer" / "weights.bin").unlink()


def delete_manifest(folder):
    (folder / "manifest.json").unlink()


def cut_manifest(folder):
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])


def change_state(folder):
    (folder / "state.json").write_text('{"position": 999}')


def change_step(folder):
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 3', '"step": 7'))


def empty_manifest(folder):
    (folder / "manifest.json").write_text('{"step": 3, "files": {}}')


def nest_manifest(folder):
    (folder / "manifest.json").write_text("[" * 100_000)


def large_manifest(folder):
    with (folder / "manifest.json").open("a") as manifest:
        manifest.truncate(17 * 2**20)


def list_manifest(folder):
    (folder / "manifest.json").write_text("[]")


def pipe_manifest(folder):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def name_in_manifest(name, content=b"secret"):
    """Names one more file in the manifest, with the size and checksum of `outside.txt`, as the other names have."""

    def spoil(folder):
        (folder.parent.parent / "outside.txt").write_bytes(content)
        (folder / "link").symlink_to(folder.parent.parent / "outside.txt")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name(folder)] = [len(content), hashlib.sha256(content).hexdigest()]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return spoil


def no_checksum(folder):
    change_manifest(folder, lambda manifest: manifest["files"].update({"state.json": [16]}))


def files_as_list(folder):
    change_manifest(folder, lambda manifest: manifest.update(files=["state.json"]))


def change_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def sealed_state(content):
    """A state that is not as it was written, with its right size and checksum."""

    def spoil(folder):
        (folder / "state.json").write_bytes(content)
        about = [len(content), hashlib.sha256(content).hexdigest()]
        change_manifest(folder, lambda manifest: manifest["files"].update({"state.json": about}))

    return spoil


DAMAGES = {
    flip: "trainer/weights.bin differs from its checksum",
    truncate: "trainer/weights.bin has 999 bytes instead of 1000",
    delete_file: "trainer/weights.bin is missing",
    delete_manifest: "its manifest cannot be read",
    cut_manifest: "its manifest cannot be read",
    change_state: "state.json has 17 bytes instead of 16",
    change_step: "its manifest is not that of this folder",
    empty_manifest: "its manifest is not that of this folder",
}


# Faults that fuzzing found
DAMAGES |= {
    nest_manifest: "its manifest cannot be read (RecursionError: maximum recursion depth exceeded",
    large_manifest: "its manifest has more than 16777216 bytes",
    list_manifest: "its manifest is no JSON object, but list",
    pipe_manifest: "its manifest is no file",
    no_checksum: "its manifest has no size and checksum for state.json",
    files_as_list: "its manifest is not that of this folder",
    sealed_state(b'{"position": NaN'): "its state cannot be read (JSONDecodeError: Expecting ',' delimiter",
    sealed_state(b"[" * 100_000): "its state cannot be read (RecursionError: maximum recursion depth exceeded",
    sealed_state(b"30"): "its state is no JSON object, but int",
}
OUTSIDE = {
    "up": lambda folder: "../../outside.txt",
    "through a folder": lambda folder: "trainer/../../../outside.txt",
    "absolute": lambda folder: str(folder.parent.parent / "outside.txt"),
    "link": lambda folder: "link",
}


@pytest.mark.parametrize("name", OUTSIDE.values(), ids=OUTSIDE)
def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path, name):
    folder = tmp_path / "checkpoints"
    write(CheckpointStore(folder, keep=3), 3)
    name_in_manifest(name)(folder / "step_000003")
    told = f"its manifest names {name(folder / 'step_000003')}, which is outside of the checkpoint"
    assert damage(folder / "step_000003") == told


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800"], ids=["nul", "long", "surrogate"])
def test_a_manifest_with_names_that_no_file_can_have_is_refused(tmp_path, name):
    write(CheckpointStore(tmp_path, keep=3), 3)
    change_manifest(tmp_path / "step_000003", lambda manifest: manifest["files"].update({name: [1, "0"]}))
    assert damage(tmp_path / "step_000003").startswith("a file of its manifest cannot be read (")


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "step_last").mkdir()
    (tmp_path / "step_1_0").mkdir()
    (tmp_path / "step_000009").write_text("a file")
    store = CheckpointStore(tmp_path, keep=1)
    for step in (1, 2):
        write(store, step)
    assert store.latest().step == 2
    assert names(tmp_path) == ["step_000002", "step_000009", "step_1_0", "step_last"]


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    store = CheckpointStore(folder, keep=1)
    write(store, 1)
    (folder / "step_000001").rename(elsewhere)
    for name in ("step_000001", ".step_000005"):
        (folder / name).symlink_to(elsewhere)
    store = CheckpointStore(folder, keep=1)
    write(store, 2)
    assert names(folder) == ["step_000002"]
    assert names(elsewhere) == ["manifest.json", "state.json", "trainer"]


def test_a_state_that_lacks_something_names_its_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 1)
    found = store.latest()
    with pytest.raises(CheckpointError) as error, found.restoring():
        EpochOrder(10, seed=0).load_state_dict(found.state["order"])
    assert str(error.value) == (
        f"{tmp_path}/step_000001/state.json: not the state that this run needs (KeyError: 'order'); remove the "
        "checkpoint step_000001 to continue from the one before"
    )


@pytest.mark.parametrize("spoil", DAMAGES, ids=lambda spoil: spoil.__name__)
def test_damaged_newest_falls_back_to_the_one_before(tmp_path, caplog, spoil):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        write(store, step)
    spoil(tmp_path / "step_000003")
    assert store.latest().step == 2
    assert f"step_000003 is damaged ({DAMAGES[spoil]}" in caplog.text


def test_all_damaged_is_an_error_that_names_each(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    write(store, 1)
    write(store, 2)
    flip(tmp_path / "step_000001")
    delete_file(tmp_path / "step_000002")
    with pytest.raises(CheckpointError) as error:
        store.latest()
    assert str(error.value) == (
        f"every checkpoint in {tmp_path} is damaged:\n"
        "step_000002: trainer/weights.bin is missing\n"
        "step_000001: trainer/weights.bin differs from its checksum\n"
        "Remove them to start over"
    )
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_leftovers_of_a_crash_are_swept_and_whole_checkpoints_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    write(store, 1)

    (store.prepare(2) / "half").write_text("half")
    assert names(tmp_path) == [".step_000002", "step_000001"]
    assert CheckpointStore(tmp_path, keep=3).latest().step == 1
    assert names(tmp_path) == ["step_000001"]


def test_damaged_checkpoint_takes_no_place_of_a_whole_one(tmp_path):
    """After falling back from step 30 to 20, the run writes 22: of the two to keep, none is the damaged one."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (20, 30):
        write(store, step)
    flip(tmp_path / "step_000030")
    assert store.latest().step == 20
    write(store, 22)
    assert names(tmp_path) == ["step_000020", "step_000022"]
    assert store.latest().step == 22


def test_same_step_again_replaces_the_damaged_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (20, 30):
        write(store, step)
    flip(tmp_path / "step_000030")
    write(store, 30)
    assert names(tmp_path) == ["step_000020", "step_000030"]
    assert store.latest().step == 30
