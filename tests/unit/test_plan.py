import pytest

from rlhf_ray.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, from_dict
from rlhf_ray.config.load import Kind
from rlhf_ray.placement.plan import GroupDemand, Plan, demands, describe, make_plan, shortfalls


def ppo(*overrides: str) -> PPOConfig:
    values = {
        "run": {"dir": "runs/x"},
        "data": {"path": "prompts.jsonl"},
        "policy": {"path": "policy", "processes": 2},
        "reward": {"models": [{"path": "reward"}]},
        "rollout": {"kv_cache_gib": 0.5, "engines": 3, "cpus": 2},
        "ppo": {"iterations": 10, "prompts_per_iteration": 8},
    }
    return from_dict(values, "ppo", overrides)


def offline(kind: Kind) -> SFTConfig | RewardConfig | DPOConfig:
    values = {
        "run": {"dir": "runs/x"},
        "data": {"path": "rows.jsonl"},
        "model": {"path": "model"},
        "group": {"processes": 2, "cpus": 0.5, "gpus": 1},
    }
    return from_dict(values, kind)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_stage_on_fixed_data_has_one_group(kind):
    assert demands(offline(kind)) == [GroupDemand("group", 2, 0.5, 1.0)]


def test_ppo_asks_for_its_five_groups():
    assert demands(ppo("critic.cpus=0.5")) == [
        GroupDemand("policy", 2, 1.0, 0.0),
        GroupDemand("rollout", 3, 2.0, 0.0),
        GroupDemand("reference", 1, 1.0, 0.0),
        GroupDemand("reward", 1, 1.0, 0.0),
        GroupDemand("critic", 1, 0.5, 0.0),
    ]


def test_an_engine_takes_the_gpus_of_all_its_ranks():
    assert demands(ppo("rollout.gpus=1", "rollout.tensor_parallel=4"))[1] == GroupDemand("rollout", 3, 2.0, 4.0)


SPLIT = ("rollout.gpus=1", "rollout.tensor_parallel=8", "rollout.nodes_per_engine=2")


def test_an_engine_over_two_nodes_takes_half_of_its_gpus_on_each():
    config = ppo(*SPLIT)
    assert demands(config)[1] == GroupDemand("rollout", 3, 2.0, 4.0, nodes=2)
    plan = make_plan(config)
    assert [plan.bundles[index] for index in plan.groups["rollout"]] == [{"CPU": 2.0, "GPU": 4.0}] * 6
    assert plan.processes("rollout") == 3
    assert plan.share("rollout", "GPU") == 8.0
    assert plan.processes("policy") == 2


def test_engines_over_several_nodes_are_counted_whole_where_the_cluster_is_too_small():
    (problem,) = shortfalls(make_plan(ppo(*SPLIT)), {"CPU": 100, "GPU": 20})
    assert problem == (
        "GPU: the run needs 24 (rollout 3 x 8) and the cluster has 20; lower rollout.engines from 3 to 2, or add 4 GPU"
    )


def test_the_cpus_of_a_split_engine_are_those_on_each_node():
    (problem,) = shortfalls(make_plan(ppo(*SPLIT, "rollout.engines=1")), {"CPU": 6, "GPU": 8})
    assert "lower rollout.cpus from 2 to 0.5" in problem


def test_the_plan_has_one_bundle_per_process_in_group_order():
    plan = make_plan(ppo("policy.gpus=0.5", "reference.cpus=0", "reference.gpus=0.25"))
    assert plan == Plan(
        bundles=[
            {"CPU": 1.0, "GPU": 0.5},
            {"CPU": 1.0, "GPU": 0.5},
            {"CPU": 2.0},
            {"CPU": 2.0},
            {"CPU": 2.0},
            {"GPU": 0.25},
            {"CPU": 1.0},
            {"CPU": 1.0},
        ],
        groups={"policy": [0, 1], "rollout": [2, 3, 4], "reference": [5], "reward": [6], "critic": [7]},
    )


def test_groups_that_share_have_one_bundle_a_rank():
    gpus = ["policy.gpus=0.4", "critic.gpus=0.2", "rollout.gpus=0.4", "rollout.cpus=1.5"]
    equal = ["critic.processes=2", "rollout.engines=2", "rollout.kv_cache_gib="]
    plan = make_plan(ppo(*gpus, *equal, "placement.share=[[rollout, critic, policy]]"))
    together = {"CPU": 3.5, "GPU": 1.0}
    assert plan.bundles == [together, together, {"CPU": 1.0}, {"CPU": 1.0}]
    assert plan.groups == {"policy": [0, 1], "rollout": [0, 1], "reference": [2], "reward": [3], "critic": [0, 1]}
    assert plan.groups_of()[0] == ("policy", "rollout", "critic")
    assert plan.takes("critic") == {"CPU": 1.0, "GPU": 0.2} and plan.takes("reward") == {"CPU": 1.0}
    assert plan.parts() == [("PACK", [0, 1, 2, 3])]
    assert plan.needed("GPU") == 2.0
    # No group of the three can have fewer processes than the others, so none is asked to.
    (lack,) = shortfalls(plan, {"CPU": 9.0, "GPU": 1.0})
    assert lack.startswith(
        "GPU: the run needs 2 (policy 2 x 0.4, rollout 2 x 0.4, critic 2 x 0.2) and the cluster has 1"
    )
    assert "lower policy.processes from" not in lack and "add 1 GPU" in lack


def test_bundles_are_not_shared_objects():
    bundles = make_plan(ppo()).bundles
    assert len({id(bundle) for bundle in bundles}) == len(bundles)


def test_nothing_is_short_when_the_cluster_has_exactly_enough():
    assert shortfalls(make_plan(ppo()), {"CPU": 11.0}) == []
    assert shortfalls(make_plan(offline("sft")), {"CPU": 1.0, "GPU": 2.0, "memory": 1e9}) == []


def test_sums_of_fractions_do_not_fall_short_by_rounding():
    plan = make_plan(ppo("policy.processes=10", "policy.cpus=0.1", "rollout.engines=1", "rollout.cpus=0.1"))
    assert shortfalls(plan, {"CPU": 4.1}) == []


@pytest.mark.parametrize(
    ("cpus", "change"),
    [
        (9.0, "lower rollout.engines from 3 to 2, or add 2 CPU"),
        (10.5, "lower critic.cpus from 1 to 0.5, or add 0.5 CPU"),
        (7.0, "lower rollout.engines from 3 to 1, or add 4 CPU"),
        (
            2.2,
            "lower policy.cpus to 0.2, rollout.cpus to 0.4, reference.cpus to 0.2, reward.cpus to 0.2, "
            "critic.cpus to 0.2, or add 8.8 CPU",
        ),
    ],
)
def test_a_shortfall_names_the_nearest_change_that_fits(cpus, change):
    assert shortfalls(make_plan(ppo()), {"CPU": cpus}) == [
        f"CPU: the run needs 11 (policy 2 x 1, rollout 3 x 2, reference 1 x 1, reward 1 x 1, critic 1 x 1) "
        f"and the cluster has {cpus:g}; {change}"
    ]


@pytest.mark.parametrize(
    ("override", "cpus"),
    [
        ("rollout.engines=2", 9),
        ("critic.cpus=0.5", 10.5),
        ("rollout.engines=1", 7),
        ("policy.processes=1", 10),
    ],
)
def test_the_suggested_change_does_fit(override, cpus):
    assert shortfalls(make_plan(ppo(override)), {"CPU": cpus}) == []


def test_ranks_of_one_group_are_not_told_to_share_a_gpu():
    plan = make_plan(offline("sft"))
    assert shortfalls(plan, {"CPU": 8.0, "GPU": 1.0}) == [
        "GPU: the run needs 2 (group 2 x 1) and the cluster has 1; lower group.processes from 2 to 1, or add 1 GPU"
    ]


def test_single_processes_are_told_to_share_a_gpu():
    plan = make_plan(ppo("critic.gpus=1", "reference.gpus=0.5"))
    assert shortfalls(plan, {"CPU": 11.0, "GPU": 1.0}) == [
        "GPU: the run needs 1.5 (reference 1 x 0.5, critic 1 x 1) and the cluster has 1; "
        "lower critic.gpus from 1 to 0.5, or add 0.5 GPU"
    ]


def test_a_cluster_without_gpus_is_offered_the_cpu():
    plan = make_plan(ppo("policy.gpus=1", "critic.gpus=1"))
    assert shortfalls(plan, {"CPU": 11.0}) == [
        "GPU: the run needs 3 (policy 2 x 1, critic 1 x 1) and the cluster has 0; "
        "set policy.gpus, critic.gpus to 0 to run on CPU, or add 3 GPU"
    ]


def test_engines_on_the_cpu_are_offered_a_cache_which_they_need_there():
    plan = make_plan(ppo("rollout.gpus=1", "rollout.kv_cache_gib="))
    (lack,) = shortfalls(plan, {"CPU": 11.0})
    assert "set rollout.gpus to 0 to run on CPU with a cache of rollout.kv_cache_gib, such as 0.5, or add 3" in lack


def test_of_engines_that_may_join_later_the_number_to_start_with_is_lowered():
    plan = make_plan(ppo("rollout.min_engines=2", "rollout.gpus=1", "rollout.tensor_parallel=2"))
    assert plan.processes("rollout") == 2 and plan.later == {"rollout": 1}
    (lack,) = shortfalls(plan, {"CPU": 11.0, "GPU": 2.0})
    assert "lower rollout.min_engines from 2 to 1, or add 2 GPU" in lack


def test_split_engines_are_not_told_to_take_fractions():
    plan = make_plan(ppo("rollout.gpus=1", "rollout.tensor_parallel=2", "rollout.engines=1"))
    assert shortfalls(plan, {"CPU": 7.0, "GPU": 1.0}) == [
        "GPU: the run needs 2 (rollout 1 x 2) and the cluster has 1; add 1 GPU"
    ]


def test_groups_of_several_processes_are_told_to_shrink_together():
    plan = make_plan(ppo("policy.gpus=1", "critic.gpus=1", "critic.processes=2"))
    assert shortfalls(plan, {"CPU": 12.0, "GPU": 2.0}) == [
        "GPU: the run needs 4 (policy 2 x 1, critic 2 x 1) and the cluster has 2; "
        "lower the processes of several groups, or add 2 GPU"
    ]


def test_every_resource_that_is_short_is_named():
    plan = make_plan(offline("sft"))
    assert [line.partition(":")[0] for line in shortfalls(plan, {})] == ["CPU", "GPU"]


def test_the_plan_is_described_as_a_table():
    assert describe(make_plan(ppo("policy.gpus=0.5"))) == (
        "group      processes  CPU each  GPU each  CPU  GPU\n"
        "policy             2         1       0.5    2    1\n"
        "rollout            3         2         0    6    0\n"
        "reference          1         1         0    1    0\n"
        "reward             1         1         0    1    0\n"
        "critic             1         1         0    1    0\n"
        "total              8                       11    1"
    )
