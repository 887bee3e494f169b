"""What a plan proposes: whatever it is, the configuration with it gives a plan without that problem."""

import random
import time
from dataclasses import replace
from functools import cache

import pytest

from rlhf_ray.config import PPOConfig, from_dict, load_config
from rlhf_ray.config.load import changed
from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.overview import Overview, overview, overviews
from rlhf_ray.placement.shapes import find_shape

MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.3-70B-Instruct")
REWARDS = ("Skywork/Skywork-Reward-V2-Qwen3-0.6B", "Skywork/Skywork-Reward-V2-Llama-3.1-8B")
SEEDS = 200

shapes = cache(find_shape)


def random_config(rng: random.Random) -> PPOConfig:
    """A valid configuration, small to large, on CPUs or on whole and shared GPUs."""
    gpus = rng.choice([0.0, 1.0, 1.0])
    few = rng.choice([1, 2, 8])

    def group(name: str) -> dict:
        part = gpus if name == "policy" or rng.random() < 0.6 else rng.choice([0.25, 0.5]) * gpus
        return {"processes": rng.choice([1, few, 2 * few]), "cpus": rng.choice([0.5, 1.0, 4.0, 16.0]), "gpus": part}

    tensor_parallel = rng.choice([1, 1, 2, 8]) if gpus else 1
    values = {
        "run": {"dir": "runs/x"},
        "data": {"path": "prompts.jsonl", "max_tokens": rng.choice([256, 2048])},
        "policy": {"path": rng.choice(MODELS), **group("policy")},
        "critic": {"init": rng.choice(["policy", "reward"]), **group("critic")},
        "reference": {**group("reference"), "dtype": rng.choice(["fp32", "bf16"])},
        "reward": {"models": [{"path": rng.choice(REWARDS)}], **group("reward")},
        "training": {
            "zero_stage": rng.choice([1, 2, 3]),
            "dtype": rng.choice(["fp32", "bf16"]),
            "gradient_checkpointing": rng.random() < 0.5,
            "micro_batch_tokens": rng.choice([4096, 8192, 65536]),
        },
        "rollout": {
            "engines": rng.choice([1, 2, 4, 16]),
            "tensor_parallel": tensor_parallel,
            "nodes_per_engine": rng.choice([1, 1, tensor_parallel]),
            "cpus": rng.choice([1.0, 8.0]),
            "gpus": gpus,
            "dtype": rng.choice(["fp32", "bf16"]),
            "kv_cache_gib": None if gpus else rng.choice([0.5, 8.0]),
            "gpu_memory_utilization": rng.choice([0.1, 0.5, 0.9]),
            "max_new_tokens": rng.choice([128, 2048]),
        },
        "ppo": {"iterations": 10, "prompts_per_iteration": 64},
        "placement": {},
    }
    if rng.random() < 0.2:
        values["rollout"]["min_engines"] = 1
    if rng.random() < 0.2:
        values["placement"]["spread"] = [rng.choice(["policy", "rollout", "reward"])]
    if rng.random() < 0.3:
        group_of_label = rng.choice(["policy", "rollout", "critic"])
        values["placement"]["labels"] = {group_of_label: {"role": rng.choice(["train", "rollout", "nowhere"])}}
    if rng.random() < 0.2:
        together = rng.sample(["policy", "critic", "rollout"], 2)
        values["placement"]["share"] = [together]
        for name in together:
            values[name]["gpus"] = 0.5 * gpus
            values[name]["engines" if name == "rollout" else "processes"] = 2
        values["rollout"] |= {"tensor_parallel": 1, "nodes_per_engine": 1, "min_engines": None}
    return from_dict(values, "ppo")


def random_nodes(rng: random.Random) -> list[Node]:
    """One to three kinds of nodes."""
    nodes = []
    for kind in range(rng.randint(1, 3)):
        gpus = rng.choice([0, 1, 4, 8])
        for number in range(rng.choice([1, 2, 8])):
            nodes.append(
                Node(
                    name=f"n{kind}-{number}",
                    cpus=rng.choice([4.0, 16.0, 96.0]),
                    gpus=gpus,
                    gpu_memory_gib=rng.choice([15.0, 40.0, 80.0, 141.0]) if gpus else None,
                    memory_gib=rng.choice([None, 8.0, 64.0, 512.0, 2000.0]),
                    labels={"role": rng.choice(["train", "rollout"])},
                )
            )
    return nodes


def valid_config(rng: random.Random) -> PPOConfig:
    while True:
        try:
            return random_config(rng)
        except ConfigError:
            continue


def abouts(found: Overview) -> set[tuple]:
    """What its problems are about: kind, groups, and the resource or the memory of each GPU or node."""
    return {
        (each.kind, each.of) if each.kind == "lack" else (each.kind, each.groups, each.of)
        for each in (problem.finding for problem in found.found)
    }


def test_whatever_is_proposed_gives_a_plan_without_that_problem():
    kinds: dict[str, list[bool]] = {}
    for seed in range(SEEDS):
        rng = random.Random(seed)
        config, nodes = valid_config(rng), random_nodes(rng)
        found = overview(config, nodes, shapes)
        for problem in found.found:
            kinds.setdefault(problem.finding.kind, []).append(bool(problem.change))
            if not problem.change:
                assert "no change that was tried fits" in problem.words, (seed, problem.words)
                continue
            assert f"; set {', '.join(problem.change)}" in problem.words
            after = overview(changed(config, problem.change), nodes, shapes)
            (gone,) = abouts(replace(found, found=[problem]))
            assert gone not in abouts(after), (seed, problem.words, after.problems)
            if not found.layout.without:  # where everybody had a seat, nothing else can have been hidden
                assert abouts(after) < abouts(found), (seed, problem.words, after.problems)
    assert set(kinds) == {"lack", "label", "size", "spread", "room", "GPU", "node", "cache"}
    for kind, proposed in kinds.items():
        assert any(proposed), kind


def box(**options) -> Node:
    return Node(**{"name": "box", "cpus": 64, "gpus": 1, "gpu_memory_gib": 80, "memory_gib": 256} | options)


def only(found: Overview):
    (problem,) = found.found
    return problem


def test_without_gpus_all_that_the_cpu_needs_is_proposed():
    config = load_config("configs/one_gpu.yaml", [], "ppo")
    problem = only(overview(config, [box(gpus=0, gpu_memory_gib=None)], shapes))
    assert problem.change == (
        *(f"{name}.gpus=0" for name in ("policy", "rollout", "reference", "reward", "critic")),
        "rollout.kv_cache_gib=0.5",
    )
    assert problem.words.endswith("rollout.kv_cache_gib=0.5, or add at least 1 GPU")
    assert overview(changed(config, problem.change), [box(gpus=0, gpu_memory_gib=None)], shapes).problems == []


def test_main_memory_that_no_change_saves_is_said_with_what_it_takes():
    config = load_config("configs/one_gpu.yaml", ["training.gradient_checkpointing=true"], "ppo")
    on_cpu = changed(config, [f"{name}.gpus=0" for name in PPOConfig.groups] + ["rollout.kv_cache_gib=0.5"])
    small = box(gpus=0, gpu_memory_gib=None, memory_gib=6)
    problem = only(overview(on_cpu, [small], shapes))
    assert problem.change == ()
    needed = float(problem.words.rpartition("; no change that was tried fits; ")[2].partition(" GiB of main memory")[0])
    assert overview(on_cpu, [small.model_copy(update={"memory_gib": needed})], shapes).problems == []
    assert overview(on_cpu, [small.model_copy(update={"memory_gib": needed - 0.2})], shapes).problems != []


def test_main_memory_is_saved_by_a_smaller_cache_where_that_is_enough():
    config = load_config("configs/one_gpu.yaml", [], "ppo")
    on_cpu = changed(config, [f"{name}.gpus=0" for name in PPOConfig.groups] + ["rollout.kv_cache_gib=64"])
    total = overview(on_cpu, [box(gpus=0, gpu_memory_gib=None)], shapes)
    needed = sum(each.in_main_memory for each in total.estimates.values()) / 2**30
    nodes = [box(gpus=0, gpu_memory_gib=None, memory_gib=needed - 40)]
    assert "rollout.kv_cache_gib=" in str(only(overview(on_cpu, nodes, shapes)).change)


def test_engines_count_with_the_memory_of_the_gpus_on_which_they_sit():
    """All groups are tied to the large GPUs; a small node that nobody uses changes nothing."""
    labels = {name: {"role": "big"} for name in PPOConfig.groups}
    config = load_config("configs/one_gpu.yaml", [f"placement.labels={labels}"], "ppo")
    big = box(labels={"role": "big"})
    small = Node(name="small", cpus=64, gpus=1, gpu_memory_gib=15, memory_gib=256, labels={"role": "small"})
    alone = overview(config, [big], shapes)
    found = overview(config, [small, big], shapes)
    assert alone.problems == found.problems == []
    assert found.estimates["rollout"].total == alone.estimates["rollout"].total == pytest.approx(0.3 * 80 * 2**30)


def test_engines_on_gpus_of_two_sizes_take_their_share_of_each():
    config = load_config(
        "configs/one_node.yaml", ["rollout.engines=2", "rollout.tensor_parallel=1", "rollout.cpus=60"], "ppo"
    )
    nodes = [box(gpus=8), box(name="other", gpus=8, gpu_memory_gib=141)]
    found = overview(config, nodes, shapes)
    share = config.rollout.gpu_memory_utilization
    sizes = {
        nodes[node].gpu_memory_gib: sum(found.on_gpu(mix, nodes[node].gpu_memory_gib).values()) / 2**30
        for (node, _), mix in found.contents.items()
        if mix == (("rollout", 1),)
    }
    assert sizes == {80: pytest.approx(80 * share), 141: pytest.approx(141 * share)}


def test_processes_without_room_are_told_a_value_that_fits():
    config = load_config("configs/one_node.yaml", ["rollout.cpus=21"], "ppo")
    nodes = [box(gpus=4, cpus=32), box(name="other", gpus=4, cpus=32)]
    found = overview(config, nodes, shapes)
    assert [problem.finding.kind for problem in found.found] == ["room"]
    assert "find no room beside the other groups; set " in found.problems[0]
    assert overview(changed(config, found.found[0].change), nodes, shapes).problems == []


def test_too_little_cache_is_told_a_value_that_fits():
    config = load_config("configs/one_gpu.yaml", ["rollout.gpu_memory_utilization=0.02"], "ppo")
    problem = only(overview(config, [box()], shapes))
    assert problem.finding.kind == "cache"
    assert problem.change == ("rollout.gpu_memory_utilization=0.05",)


def test_a_pipeline_is_told_keys_of_its_own():
    config = load_config("configs/demo.yaml", [], "pipeline")
    nodes = [Node(name="tiny", cpus=1, memory_gib=12)]
    told = [(one.stage, problem) for one in overviews(config, nodes) for problem in one.found if problem.change]
    assert [stage for stage, _ in told] == ["sft", "reward", "ppo"]
    for stage, problem in told:
        assert all(override.startswith(f"{stage}.") for override in problem.change)
        (after,) = [one for one in overviews(changed(config, problem.change), nodes) if one.stage == stage]
        assert after.problems == []


LARGE = ["policy.processes=512", "critic.processes=128", "rollout.engines=64", "reference.processes=64"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["reward.processes=40"],
        ["policy.cpus=30"],
        ["placement.spread=[policy]"],
        ["rollout.cpus=60", "policy.cpus=12"],
        ["placement.labels={policy: {role: b}, rollout: {role: b}, critic: {role: b}}"],
        ["policy.processes=2000", "critic.processes=700", "rollout.engines=300"],
        ["training.micro_batch_tokens=262144", "training.gradient_checkpointing=false"],
    ],
)
def test_a_thousand_gpus_take_less_than_two_seconds(overrides):
    config = load_config("configs/multi_node.yaml", [*LARGE, *overrides], "ppo")
    nodes = [
        Node(name=f"n{i}", cpus=96, gpus=8, gpu_memory_gib=80, memory_gib=1500, labels={"role": "ab"[i % 2]})
        for i in range(125)
    ]
    started = time.process_time()  # what others do on this machine does not count
    found = overview(config, nodes, shapes)
    assert time.process_time() - started < 1.5  # the command takes half a second to start
    assert found.problems
