import pytest

from rlhf_ray.config import from_dict
from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.inventory import Node, load_inventory, node_from_ray
from rlhf_ray.placement.layout import Seat, crowding, lay_out, misfits
from rlhf_ray.placement.plan import Plan, make_plan


def nodes(count: int, cpus: float = 8.0, gpus: int = 0, **labels: str) -> list[Node]:
    return [
        Node(name=f"n{i}", cpus=cpus, gpus=gpus, gpu_memory_gib=80.0 if gpus else None, labels=labels)
        for i in range(count)
    ]


def plan_of(groups: dict[str, tuple[int, dict[str, float]]], **options) -> Plan:
    bundles: list[dict[str, float]] = []
    seats = {}
    for name, (count, bundle) in groups.items():
        seats[name] = list(range(len(bundles), len(bundles) + count))
        bundles += [dict(bundle) for _ in range(count)]
    return Plan(bundles, seats, **options)


def test_ranks_of_a_group_fill_one_node_after_the_other():
    plan = plan_of({"policy": (4, {"CPU": 1, "GPU": 1})})
    assert lay_out(plan, nodes(2, gpus=2)).seats == [
        Seat("policy", 0, 0, 0, (0,)),
        Seat("policy", 1, 0, 0, (1,)),
        Seat("policy", 2, 0, 1, (0,)),
        Seat("policy", 3, 0, 1, (1,)),
    ]


def test_fractions_share_a_gpu_and_whole_gpus_come_first():
    plan = plan_of({"reference": (1, {"GPU": 0.5}), "policy": (1, {"GPU": 1}), "reward": (1, {"GPU": 0.5})})
    found = {seat.group: seat.gpus for seat in lay_out(plan, nodes(1, gpus=2)).seats}
    assert found == {"policy": (0,), "reference": (1,), "reward": (1,)}


def test_a_split_engine_takes_its_gpus_on_one_node():
    plan = plan_of({"rollout": (2, {"GPU": 4}), "policy": (4, {"GPU": 1})})
    seats = lay_out(plan, nodes(2, gpus=6)).seats
    engines = [seat for seat in seats if seat.group == "rollout"]
    assert [(seat.node, seat.gpus) for seat in engines] == [(0, (0, 1, 2, 3)), (1, (0, 1, 2, 3))]
    assert sorted((seat.node, seat.gpus) for seat in seats if seat.group == "policy") == [
        (0, (4,)),
        (0, (5,)),
        (1, (4,)),
        (1, (5,)),
    ]


def test_an_engine_that_is_larger_than_a_node_takes_the_gpus_of_two():
    plan = plan_of({"rollout": (4, {"GPU": 4})}, split={"rollout": 2})
    assert lay_out(plan, nodes(4, gpus=4)).seats == [
        Seat("rollout", 0, 0, 0, (0, 1, 2, 3)),
        Seat("rollout", 0, 1, 1, (0, 1, 2, 3)),
        Seat("rollout", 1, 0, 2, (0, 1, 2, 3)),
        Seat("rollout", 1, 1, 3, (0, 1, 2, 3)),
    ]


def test_spread_processes_have_a_node_each_and_labels_are_kept_to():
    cluster = nodes(2) + nodes(3, role="rollout")
    plan = plan_of(
        {"policy": (2, {"CPU": 1}), "rollout": (3, {"CPU": 1})},
        labels={"rollout": {"role": "rollout"}},
        spread=("rollout",),
    )
    layout = lay_out(plan, cluster)
    assert [seat.node for seat in layout.seats if seat.group == "rollout"] == [2, 3, 4]
    assert misfits(plan, cluster) == [] and crowding(plan, layout) == {}
    assert plan.parts() == [("STRICT_SPREAD", [2, 3, 4]), ("PACK", [0, 1])]


def test_groups_that_share_sit_on_the_same_gpus_rank_by_rank():
    taken = {"CPU": 1.0, "GPU": 0.5}
    bundles = [{"CPU": 2.0, "GPU": 1.0} for _ in range(4)]
    plan = Plan(
        bundles,
        {"policy": [0, 1, 2, 3], "rollout": [0, 1, 2, 3]},
        labels={"rollout": {"role": "gpu"}},
        portions={"policy": taken, "rollout": taken},
    )
    seats = lay_out(plan, nodes(1, gpus=2) + nodes(2, gpus=2, role="gpu")).seats
    places = [(1, (0,)), (1, (1,)), (2, (0,)), (2, (1,))]  # all where one of them must be
    for group in ("policy", "rollout"):
        assert [(seat.node, seat.gpus) for seat in seats if seat.group == group] == places


def test_groups_that_share_and_fit_no_node_are_named_together_once():
    portions = {"policy": {"CPU": 2.0}, "rollout": {"CPU": 7.0}}
    plan = Plan([{"CPU": 9.0}], {"policy": [0], "rollout": [0]}, portions=portions)
    assert misfits(plan, nodes(2)) == [
        "policy with rollout: a process of each needs 9 CPU on one node, and the nodes have at most 8 CPU each; lower "
        "rollout.cpus"
    ]


@pytest.mark.parametrize(
    ("options", "bundle", "message"),
    [
        (
            {"labels": {"rollout": {"role": "gpu"}}},
            {"CPU": 1},
            "rollout: no node has the label role=gpu, and the labels of the nodes are role=head; "
            "change placement.labels.rollout, or label nodes",
        ),
        (
            {},
            {"CPU": 1, "GPU": 8},
            "rollout: a process needs 1 CPU and 8 GPU on one node, and the nodes have at most 8 CPU and 4 GPU each; "
            "lower rollout.tensor_parallel, or raise rollout.nodes_per_engine",
        ),
        (
            {},
            {"CPU": 9},
            "rollout: a process needs 9 CPU on one node, and the nodes have at most 8 CPU each; lower rollout.cpus",
        ),
        (
            {"spread": ("rollout",)},
            {"CPU": 1},
            "rollout: placement.spread puts its 3 bundles on a node each, and 2 nodes can hold one; lower its number "
            "of processes, or take it out of placement.spread",
        ),
    ],
)
def test_what_no_node_can_hold_is_said_with_the_key_to_change(options, bundle, message):
    plan = plan_of({"rollout": (3, bundle)}, **options)
    assert misfits(plan, nodes(2, gpus=4, role="head")) == [message]


def test_processes_without_room_beside_the_others_are_counted():
    plan = plan_of({"policy": (2, {"CPU": 5}), "critic": (2, {"CPU": 5})})
    layout = lay_out(plan, nodes(3))
    assert len(layout.seats) == 3 and layout.without == {"critic": 1}
    assert crowding(plan, layout) == {"critic": "critic: 1 of 2 bundles find no room beside the other groups"}


def test_a_configuration_names_labels_and_spread_by_group():
    values = {
        "run": {"dir": "runs/x"},
        "data": {"path": "prompts.jsonl"},
        "policy": {"path": "policy"},
        "reward": {"models": [{"path": "reward"}]},
        "rollout": {"kv_cache_gib": 0.5},
        "ppo": {"iterations": 10, "prompts_per_iteration": 8},
        "placement": {"labels": {"rollout": {"role": "gpu"}}, "spread": ["policy"], "timeout_s": 5},
    }
    plan = make_plan(from_dict(values, "ppo"))
    assert (plan.labels, plan.spread, plan.timeout_s) == ({"rollout": {"role": "gpu"}}, ("policy",), 5)
    values["placement"] = {"spread": ["rollouts"]}
    with pytest.raises(ConfigError, match=r"placement.spread: names 'rollouts', but the groups are policy, rollout"):
        from_dict(values, "ppo")


def test_an_inventory_is_read_and_numbered(tmp_path):
    file = tmp_path / "nodes.yaml"
    file.write_text(
        "nodes:\n"
        "  - {name: head, cpus: 16}\n"
        "  - {name: gpu, count: 2, cpus: 64, gpus: 8, gpu_memory_gib: 80, labels: {role: train}}\n"
    )
    found = load_inventory(file)
    assert [node.name for node in found] == ["head", "gpu-0", "gpu-1"]
    assert found[2].amounts == {"CPU": 64.0, "GPU": 8.0} and found[2].labels == {"role": "train"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: []\n", "nodes: found .* expected at least one item"),
        ("nodes:\n  - {name: a, cpus: 1, gpu: 2}\n", "nodes.0.gpu: unknown key; did you mean nodes.0.gpus"),
        ("nodes:\n  - {name: a, cpus: 1, gpus: 2}\n", "nodes.0.gpu_memory_gib: not given, but `nodes.0.gpus` is 2"),
        ("- a\n", "expected a list of nodes below `nodes:`"),
    ],
)
def test_a_wrong_inventory_is_one_error(tmp_path, text, message):
    (tmp_path / "nodes.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_inventory(tmp_path / "nodes.yaml")


def test_a_node_of_ray_knows_its_gpus_memory_by_their_type():
    entry = {
        "NodeManagerAddress": "10.0.0.1",
        "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 2.0**34},
        "Labels": {"ray.io/accelerator-type": "H100"},
    }
    node = node_from_ray(entry)
    assert (node.gpus, node.gpu_memory_gib, node.memory_gib) == (2, 79.6, 16.0)
