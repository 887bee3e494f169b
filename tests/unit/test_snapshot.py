"""What a rank writes of a checkpoint, and how the driver learns of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.errors import CheckpointError
from rlhf_ray.training.snapshot import Snapshot, all_written
from rlhf_ray.training.state import Fragment, Partition, copy_state


def snapshot(rank: int = 0) -> Snapshot:
    common = {"steps": 3} if rank == 0 else None
    return Snapshot(rank, {"master.0": torch.arange(4.0)}, {"steps": "[3]"}, common, {"torch": torch.get_rng_state()})


def test_a_copy_keeps_what_the_optimizer_goes_on_changing():
    flat = torch.arange(6.0).requires_grad_()
    optimizer = torch.optim.AdamW([flat], lr=0.1)

    def step() -> None:
        flat.grad = torch.ones(6)
        optimizer.step()

    step()
    partition = Partition(optimizer, [flat], [Fragment("w", 0, 0, 0, 6)], lambda: None, replicated=False)
    expected = {"master.0": flat.detach().clone()}
    expected |= {f"{name}.0": optimizer.state[flat][name].clone() for name in ("exp_avg", "exp_avg_sq")}
    tensors, metadata = copy_state(partition, rank=1)
    step()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert metadata == {"fragments": '[["w", 0, 0, 0, 6]]', "steps": "[1]"}
    assert not torch.equal(flat.detach(), expected["master.0"])


def test_all_ranks_have_written_once_every_marker_is_there(tmp_path):
    folder = tmp_path / "policy"
    assert not all_written(folder, 2)
    snapshot(0).write_aside(folder).join()
    assert not all_written(folder, 2)
    snapshot(1).write_aside(folder).join()
    assert all_written(folder, 2)
    assert sorted(path.name for path in folder.iterdir()) == [
        "random_00000.pt",
        "random_00001.pt",
        "state_00000.safetensors",
        "state_00001.safetensors",
        "trainer.json",
    ]
    assert torch.equal(load_file(folder / "state_00001.safetensors")["master.0"], torch.arange(4.0))


def test_a_rank_that_cannot_write_says_why_and_leaves_room(tmp_path):
    """Its last file is a folder already, which no file can replace."""
    (tmp_path / "random_00001.pt").mkdir()
    snapshot(1).write_aside(tmp_path).join()
    snapshot(0).write_aside(tmp_path).join()
    with pytest.raises(CheckpointError, match=r"rank 1 could not write its part: .*(directory|random_00001)"):
        all_written(tmp_path, 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_named(tmp_path):
    """`/dev/full` is a disk that is always full."""
    (tmp_path / "random_00000.pt").symlink_to("/dev/full")
    snapshot(0).write_aside(tmp_path).join()
    with pytest.raises(CheckpointError, match="rank 0 could not write its part"):
        all_written(tmp_path, 1)
    assert not (tmp_path / "state_00000.safetensors").exists()


def test_a_folder_that_was_given_up_is_not_made_again(tmp_path):
    snapshot(0).write_aside(tmp_path / "gone" / "policy").join()
    assert list(tmp_path.iterdir()) == []
