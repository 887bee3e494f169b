import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.cli import main
from rlhf_ray.placement.memory import PARTS


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["plan", *arguments])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_the_picture_shows_groups_nodes_and_the_verdict(run):
    code, out, err = run("configs/multi_node.yaml", "--inventory", "cluster/nodes.yaml")
    assert (code, err) == (0, "")
    assert "gpu-4 to gpu-7 (4 nodes): 8 GPUs of 180 GiB, 96 CPUs, 1500 GiB, role=train" in out
    (policy,) = [line for line in out.splitlines() if line.endswith("policy 0-31")]
    assert policy.startswith("  GPU 0-7 ")
    assert "of 180" in policy
    (bundles,) = [line for line in out.splitlines() if line.startswith("PACK: ")]
    assert "32 x policy (" in bundles and "8 x rollout (" in bundles
    assert out.rstrip().endswith("It fits.")


def test_what_does_not_fit_is_an_error_after_the_picture(run):
    code, out, err = run(
        "configs/multi_node.yaml", "--inventory", "cluster/nodes.yaml", "training.gradient_checkpointing=false"
    )
    assert code == 1
    (problem,) = [line for line in out.splitlines() if line.startswith("problem: GPU 0 of gpu-4")]
    assert problem.endswith("; set training.gradient_checkpointing=true")
    assert err == "error: configs/multi_node.yaml does not fit: 1 problem, see above\n"


def test_missing_nodes_that_an_autoscaler_may_add_are_no_failure(run):
    larger = ("configs/multi_node.yaml", "--inventory", "cluster/nodes.yaml", "policy.processes=64")
    code, out, _ = run(*larger)
    assert code == 1 and "add at least 32 GPU" in out
    code, out, err = run(*larger, "placement.autoscaling=true")
    (waits,) = [line for line in out.splitlines() if line.startswith("not yet: ")]
    assert (code, err) == (0, "") and "problem:" not in out and "It fits" not in out
    assert " s (placement.timeout_s) for an autoscaler to add nodes, and fails without; or set policy" in waits
    code, out, _ = run(*larger, "placement.autoscaling=true", "--json")
    found = json.loads(out)
    (stage,) = found["stages"]
    assert (code, found["fits"], stage["problems"], len(stage["waits"])) == (0, False, [], 1)
    assert [one["change"] for one in stage["waits"]] == [["policy.processes=32"]]
    code, out, _ = run(*larger, "placement.autoscaling=true", "training.gradient_checkpointing=false")
    assert code == 1 and "problem: GPU 0 of gpu-" in out and "not yet: " in out


def test_json_holds_every_process_and_its_memory_by_part(run):
    code, out, _ = run("configs/multi_node.yaml", "--inventory", "cluster/nodes.yaml", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] is True
    (stage,) = found["stages"]
    assert len(stage["processes"]) == 32 + 8 + 4 + 4 + 8
    memory = stage["memory"]["policy"]
    assert memory["total"] == pytest.approx(sum(memory[part] for part in PARTS if part in memory))
    assert memory["at_rest"] is None  # nobody takes turns
    assert len(stage["gpus"]) == 32 + 8 * 4 + 4 + 4 + 8
    (first, *_) = [gpu for gpu in stage["gpus"] if gpu["processes"] == {"policy": 1}]
    assert first["needed"] == pytest.approx(memory["total"]) == pytest.approx(sum(first["parts"].values()))
    assert first["memory"] == 180 * 2**30 and first["unknown"] == []
    (group,) = stage["placement_groups"]
    assert group["strategy"] == "PACK" and len(group["bundles"]) == 56


def test_json_counts_groups_that_take_turns_on_a_gpu_at_the_turn_that_takes_most(run, tmp_path):
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text("nodes: [{name: box, cpus: 64, gpus: 1, gpu_memory_gib: 80, memory_gib: 256}]\n")
    code, out, _ = run("configs/one_gpu.yaml", "--inventory", str(nodes), "--json")
    assert code == 0
    (stage,) = json.loads(out)["stages"]
    memory, (gpu,) = stage["memory"], stage["gpus"]
    resting = ("policy", "critic", "rollout")
    assert all(0 < memory[group]["at_rest"] < memory[group]["total"] for group in resting)
    turns = {
        "engines": memory["rollout"]["total"] + memory["policy"]["at_rest"] + memory["critic"]["at_rest"],
        "trainers": memory["rollout"]["at_rest"] + memory["policy"]["total"] + memory["critic"]["total"],
    }
    always = memory["reference"]["total"] + memory["reward"]["total"]
    assert gpu["needed"] == pytest.approx(max(turns.values()) + always) == pytest.approx(sum(gpu["parts"].values()))
    assert gpu["needed"] < sum(each["total"] for each in memory.values())
    assert gpu["parts"]["at rest"] > 0


def test_engines_that_join_later_are_said_in_picture_and_json(run):
    arguments = ("configs/multi_node.yaml", "--inventory", "cluster/nodes.yaml", "rollout.min_engines=3")
    code, out, _ = run(*arguments)
    assert code == 0
    (row,) = [line for line in out.splitlines() if line.startswith("rollout  ")]
    assert row.split()[1:4] == ["3", "of", "8"]
    assert (
        "rollout: the 3 to start with (rollout.min_engines) of 8 (rollout.engines) are drawn; the others join as nodes "
        "have room"
    ) in out
    (stage,) = json.loads(run(*arguments, "--json")[1])["stages"]
    assert stage["joining_later"] == {"rollout": 5}


def test_json_holds_the_changes_as_overrides(run):
    arguments = ("configs/multi_node.yaml", "--inventory", "cluster/nodes.yaml", "--json")
    code, out, _ = run(*arguments, "training.gradient_checkpointing=false")
    (stage,) = json.loads(out)["stages"]
    assert code == 1 and [one["change"] for one in stage["problems"]] == [["training.gradient_checkpointing=true"]]


def test_this_machine_is_the_inventory_where_none_is_given(run):
    code, out, _ = run("configs/smoke_sft.yaml", "--json")
    assert [node["name"] for node in json.loads(out)["nodes"]] == ["this machine"]
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/none.yaml"], "configs/none.yaml: cannot be read"),
        (["configs/smoke_sft.yaml", "--inventory", "none.yaml"], "none.yaml: cannot be read"),
        (["configs/smoke_sft.yaml", "--inventory", "a.yaml", "--address", "auto"], "both given; give one of them"),
        (["cluster/nodes.yaml"], "no section of a stage, expected one of sft, reward_model, dpo, ppo"),
    ],
)
def test_wrong_input_is_one_error(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_an_inventory_without_gpus_is_one_error_that_says_what_to_change(run, tmp_path):
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text("nodes: [{name: cpu, count: 10, cpus: 96, memory_gib: 1500}]\n")
    code, out, err = run("configs/multi_node.yaml", "--inventory", str(nodes))
    assert code == 1
    (problem,) = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert problem.startswith("problem: GPU: the run needs 80 (policy 32 x 1, rollout 8 x 4, ")
    assert " and the cluster has 0; set policy.gpus=0, rollout.gpus=0, " in problem
    assert "rollout.kv_cache_gib=" in problem  # which an engine on CPUs cannot do without
    assert " or add " in problem and problem.endswith("GPU")
    assert err == "error: configs/multi_node.yaml does not fit: 1 problem, see above\n"


# What the process has imported, and the seconds that it computed, whatever else the machine does.
MEASURED = """
import sys, time
from rlhf_ray.cli import main
try:
    main(["plan", *sys.argv[1:]])
finally:
    print(time.process_time(), *sys.modules, file=sys.stderr)
"""
THOUSAND = ["policy.processes=512", "critic.processes=128", "rollout.engines=58"]
THOUSAND += ["reference.processes=64", "reward.processes=64"]


def test_a_plan_for_a_thousand_gpus_takes_seconds_and_neither_ray_nor_torch(tmp_path):
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text("nodes: [{name: gpu, count: 125, cpus: 96, gpus: 8, gpu_memory_gib: 180, memory_gib: 1500}]\n")
    command = [sys.executable, "-c", MEASURED, "configs/multi_node.yaml", "--inventory", str(nodes), "--json"]
    result = subprocess.run([*command, *THOUSAND], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (stage,) = json.loads(result.stdout)["stages"]
    used = [(process["node"], gpu) for process in stage["processes"] for gpu in process["gpus"]]
    assert len(used) == len(set(used)) == 1000
    seconds, *imported = result.stderr.split()
    assert not {"ray", "torch", "numpy", "vllm", "deepspeed", "transformers"} & set(imported)
    # It takes about one; a layout of quadratic cost would take minutes.
    assert float(seconds) < 10


def write_cells(path: Path, device: str, dtype: str) -> str:
    """A result of `rlhf-ray bench` for a model of a billion operations a token."""
    rows = [
        ("sample", "causal", 1e9, 0.02, 64),
        ("prompt", "causal", 1e9, 1e-5, 0),
        ("forward", "causal", 1e9, 1e-5, 0),
        ("forward", "scalar", 1e9, 1e-5, 0),
        ("step", "causal", 3e9, 4e-5, 0),
        ("step", "scalar", 3e9, 3e-5, 0),
        ("transfer", "causal", 1e9, 0.1, 0),
    ]
    names = ("work", "head", "size", "seconds", "at_once")
    cells = [dict(zip(names, row, strict=True)) | {"dtype": dtype, "device": device} for row in rows]
    hardware = [{"node": "one", "cpus": 2, "gpus": 1 if device == "GPU" else 0, "gpu_memory_gib": None}]
    report = {"benchmark": "iteration", "hardware": hardware, "processor": "A processor", "cells": cells}
    path.write_text(json.dumps(report))
    return str(path)


def test_throughput_of_a_thousand_gpus(tmp_path):
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text("nodes: [{name: gpu, count: 125, cpus: 96, gpus: 8, gpu_memory_gib: 180, memory_gib: 1500}]\n")
    command = [sys.executable, "-c", MEASURED, "configs/multi_node.yaml", "--inventory", str(nodes), "--json"]
    command += ["--throughput", write_cells(tmp_path / "a.json", "GPU", "bf16"), "--response", "lognormal:300:0.9:2048"]
    result = subprocess.run([*command, *THOUSAND], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["throughput"]
    seconds, *imported = result.stderr.split()
    assert not {"ray", "torch", "vllm", "deepspeed", "transformers"} & set(imported)
    assert float(seconds) < 20
    assert found["iteration_s"] == pytest.approx(sum(found["parts_s"].values()))
    assert found["responses"] == 1024 and found["mean_prompt_tokens"] == 2048
    assert found["groups"]["rollout"]["units"] == 4 and found["groups"]["policy"]["processes"] == 512
    saved = [option["saved_s"] for option in found["options"]]
    assert len(saved) == 5 and saved == sorted(saved, reverse=True)


def test_throughput_in_words(run, tmp_path):
    inventory = ("--inventory", "cluster/nodes.yaml")
    cells = write_cells(tmp_path / "a.json", "GPU", "bf16")
    code, out, _ = run("configs/multi_node.yaml", *inventory, "--throughput", cells, "--prompt", "100")
    lines = out.splitlines()
    assert code == 0
    assert f"throughput, estimated from {cells}: iteration on 2 cores and 1 GPU, A processor" in lines
    (first,) = [line for line in lines if line.startswith("1024 responses of 2048 tokens on average (at most 2048)")]
    assert " to prompts of 100: " in first and first.endswith(" tokens/s")
    (waits,) = [line for line in lines if line.startswith("  the iteration waits most for: ")]
    (best,) = [line for line in lines if line.startswith("  the next GPU to ")]
    # All responses end together, and what scoring then takes is the most that a single GPU can shorten.
    assert waits.endswith(": rollout") and "reference: reference.processes=5, " in best
    assert any(line.startswith("    or to rollout: rollout.engines=9 takes 4 GPUs, ") for line in lines)
    assert any("note: the policy takes " in line and "proportion" in line for line in lines)
    assert any("rollout.max_concurrency is 256; beyond" in line for line in lines)


def test_speeds_that_do_not_serve_are_one_error(run, tmp_path):
    cpu = write_cells(tmp_path / "cpu.json", "CPU", "fp32")
    code, out, err = run("configs/multi_node.yaml", "--inventory", "cluster/nodes.yaml", "--throughput", cpu)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"in bf16 on a GPU, and {cpu} holds fp32 on a CPU; measure on the hardware that" in err
    code, _, err = run("configs/demo.yaml", "--throughput", cpu)
    assert code == 2 and "name a configuration of `rlhf-ray ppo`" in err
    code, _, err = run("configs/multi_node.yaml", "--response", "12")
    assert code == 2 and "name a result with --throughput" in err


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_an_address_where_nothing_answers_is_one_error(mode, tmp_path):
    with socket.socket() as holder:
        holder.bind(("", 0))  # bound and not listening, so that nobody else does
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        result = subprocess.run(
            [sys.executable, "-m", "rlhf_ray", "plan", "configs/smoke_sft.yaml", "--address", address],
            env=os.environ | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: --address: no Ray cluster answers at '{address}' (")
    assert "Connection refused" in result.stderr and "`ray start --head`" in result.stderr
    assert result.stderr.count("\n") == 1
