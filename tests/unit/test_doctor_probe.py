"""What the doctor looks at, on the machine of the test, and what it takes from a configuration."""

import threading
import time
from pathlib import Path

import pytest
from tiny_models import make_llama

from rlhf_ray.cli import main
from rlhf_ray.doctor import probe
from rlhf_ray.doctor.needs import read_needs
from rlhf_ray.doctor.network import ring
from rlhf_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_a_check_that_hangs_or_fails_leaves_the_others():
    release = threading.Event()
    started = time.monotonic()
    facts = probe.attempt(
        {"hangs": lambda: {"waited": release.wait(60)}, "fails": lambda: {"a": 1 / 0}, "works": lambda: {"a": 1}}, 0.5
    )
    release.set()
    assert time.monotonic() - started < 30
    assert facts == {
        "hangs": {"error": "no answer within 0.5 s"},
        "fails": {"error": "ZeroDivisionError: division by zero"},
        "works": {"a": 1},
    }


def test_the_report_of_this_machine(tmp_path):
    (tmp_path / "token").touch()
    make_llama(tmp_path / "model")
    models = {str(tmp_path / "model"): True, str(tmp_path / "none"): True, str(tmp_path): True}
    report = probe.NodeProbe().report(str(tmp_path), models, str(tmp_path), "token")
    assert not [name for name, facts in report.items() if "error" in facts]
    assert all(report["versions"].values())
    assert report["cpu"]["cores"] > 0
    assert 0 < report["memory"]["available"] <= report["memory"]["total"]
    assert 0 < report["Ray's disk"]["free"] <= report["Ray's disk"]["total"]
    assert report["open files"]["soft"] != 0
    facts = report["run directory"]
    assert (facts["exists"], facts["shared"], facts["refused"]) == (True, True, None)
    assert list(report["models"].values()) == ["folder", "missing", "no config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "token"]


def test_a_run_directory_that_is_not_the_drivers(tmp_path):
    assert probe.run_directory(str(tmp_path), "token")["shared"] is False
    assert probe.run_directory(str(tmp_path / "none"), "token") == {"path": str(tmp_path / "none"), "exists": False}


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'if [ -z "$1" ]; then echo "| NVIDIA-SMI 580.1  Driver Version: 580.1  CUDA Version: 13.0 |"; exit; fi\n'
        'echo "0, NVIDIA H100 80GB HBM3, 81559, 81000, 580.1"; echo "1, NVIDIA GB10, [N/A], [N/A], 580.1"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert probe.gpus() == {
        "gpus": [
            {"index": "0", "name": "NVIDIA H100 80GB HBM3", "total": 81559 * 2**20, "free": 81000 * 2**20},
            {"index": "1", "name": "NVIDIA GB10", "total": None, "free": None},
        ],
        "NVIDIA driver": "580.1",
        "CUDA": "13.0",
    }
    program.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    with pytest.raises(OSError, match="nvidia-smi failed: No devices were found"):
        probe.gpus()


def test_a_host_that_does_not_answer_has_a_reason():
    assert "refused" in (probe.unreachable("http://127.0.0.1:9") or "")


@pytest.mark.parametrize(
    ("count", "rounds"),
    [
        (1, []),
        (2, [[(0, 1)]]),
        (3, [[(0, 1)], [(1, 2)], [(2, 0)]]),
        (4, [[(0, 1), (2, 3)], [(1, 2), (3, 0)]]),
        (5, [[(0, 1), (2, 3)], [(1, 2), (3, 4)], [(4, 0)]]),
    ],
)
def test_the_rounds_of_a_ring(count, rounds):
    assert ring(count) == rounds


def test_the_needs_of_a_pipeline_leave_out_what_its_stages_make():
    needs = read_needs(ROOT / "configs" / "demo.yaml", ["run.dir=runs/mine"])
    assert needs.run_dir == Path("runs/mine").absolute()
    assert list(needs.plans) == ["sft", "reward", "ppo"]
    assert needs.models == {}
    assert (needs.wandb, needs.gpus, needs.gpu_share) == (False, False, None)


def test_the_needs_of_a_run_on_gpus():
    needs = read_needs(ROOT / "configs" / "multi_node.yaml", ["critic.init=/shared/critic"])
    assert needs.models == {
        "meta-llama/Llama-3.3-70B-Instruct": False,
        "Skywork/Skywork-Reward-V2-Llama-3.1-8B": False,
        "/shared/critic": True,
    }
    assert (needs.wandb, needs.gpus, needs.gpu_share) == (True, True, 0.85)
    assert needs.plans["ppo"].needed("GPU") == 80


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_told_by_its_sections(path):
    kind = path.read_text().split()[2]
    assert kind == "pipeline" or list(read_needs(path, []).plans) == [kind]


def test_a_configuration_that_cannot_be_told(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("run: {dir: a}\ndata: {path: b.jsonl}\nmodel: {path: c}\n")
    with pytest.raises(ConfigError, match="no section of a stage, expected one of sft, reward_model, dpo, ppo"):
        read_needs(path, [])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_needs(tmp_path / "none.yaml", [])


def test_an_address_where_nothing_listens_is_one_error(alone, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--address", "127.0.0.1:9"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: --address: no Ray cluster answers at '127.0.0.1:9' (")


def test_changes_need_a_configuration(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "run.dir=a"])
    assert ended.value.code == 2
    assert "name it with --config" in capsys.readouterr().err
