import json

import pytest

from rlhf_ray.cli import main


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


def test_json_holds_every_process_and_its_memory_by_part(run):
    code, out, _ = run("configs/multi_node.yaml", "--inventory", "cluster/nodes.yaml", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] is True
    (stage,) = found["stages"]
    assert len(stage["processes"]) == 32 + 8 + 4 + 4 + 8
    memory = stage["memory"]["policy"]
    assert memory["total"] == pytest.approx(sum(size for name, size in memory.items() if name != "total"))
    (group,) = stage["placement_groups"]
    assert group["strategy"] == "PACK" and len(group["bundles"]) == 56


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
