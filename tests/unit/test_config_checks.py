import re

import pytest
from config_values import PIPELINE, VALUES, problem

from rlhf_ray.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, from_dict
from rlhf_ray.config.load import CONFIGS

# Values that contradict each other


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        (
            "sft",
            ["model.path=", "model.scratch.hidden_size=100"],
            "model.scratch.hidden_size: 100 over `model.scratch.num_heads` 8 gives heads of "
            "12.5, and the engine "
            "needs a multiple of 32; set it to a multiple of 256",
        ),
        (
            "sft",
            ["model.path=", "model.scratch.hidden_size=192", "model.scratch.num_heads=12"],
            "model.scratch.hidden_size: 192 over `model.scratch.num_heads` 12 gives heads of "
            "16, and the engine "
            "needs a multiple of 32; set it to a multiple of 384\n"
            "model.scratch.num_kv_heads: 8 does not divide `model.scratch.num_heads` 12; "
            "choose a divisor of it",
        ),
        (
            "sft",
            ["model.path=", "model.scratch.num_kv_heads=3"],
            "model.scratch.num_kv_heads: 3 does not divide `model.scratch.num_heads` 8; choose a divisor of it",
        ),
        (
            "sft",
            ["model.scratch={}"],
            "model.scratch: given, and so is `model.path` ('model'); keep one of the two",
        ),
        (
            "sft",
            ["model.path="],
            "model.path: not given; set it to a model folder or hub name, or fill `model.scratch`",
        ),
        (
            "ppo",
            ["policy.gpus=0.5", "rollout.gpus=0.5"],
            "rollout.gpus: 0.5 beside `policy.gpus` 0.5 could put both on one GPU, where NCCL sends nothing; name both "
            "in one set of `placement.share`, or set either to 1",
        ),
        (
            "ppo",
            ["placement.share=[[policy]]"],
            "placement.share: has a set of policy alone; name what it shares with, too",
        ),
        (
            "ppo",
            ["placement.share=[[policy, critic], [rollout, policy]]"],
            "placement.share: names policy 2 times; put all groups that share with it into one set, once each",
        ),
        (
            "ppo",
            [
                "placement.share=[[policy, rollout]]",
                "policy={path: p, processes: 2, gpus: 0.25}",
                "rollout={engines: 2, gpus: 0.25}",
            ],
            "placement.share: takes 0.5 of a GPU for a rank of each group, and two ranks of one group could sit on one "
            "GPU; let their `gpus` add up to more than half",
        ),
        (
            "ppo",
            ["placement.share=[[policy, rollout]]", "policy.processes=2"],
            "placement.share: pairs groups rank by rank, and they differ in number (`policy.processes` 2, "
            "`rollout.engines` 1); make them equal",
        ),
        (
            "ppo",
            ["placement.share=[[policy, rollout]]", "rollout.gpus=0.5"],
            "placement.share: has groups on a GPU and others without one (`policy.gpus` 0); give them a part of it, "
            "or none",
        ),
        (
            "ppo",
            ["placement.share=[[policy, rollout]]", "rollout.gpus=0.5", "policy.gpus=1"],
            "placement.share: needs more than one GPU for a process of each (`policy.gpus` 1, `rollout.gpus` 0.5); let "
            "them add up to 1 at most",
        ),
        (
            "ppo",
            ["placement.share=[[policy, rollout]]", "placement.spread=[policy]"],
            "placement.spread: names policy, which shares (`placement.share`); take it out of either",
        ),
        (
            "ppo",
            ["placement.share=[[policy, rollout]]", "placement.labels={policy: {role: a}, rollout: {role: b}}"],
            "placement.labels: asks for several values of role (policy a, rollout b) in groups that share; use one",
        ),
        (
            "ppo",
            ["placement.share=[[policy, rollout]]", "rollout.gpus=0.5", "policy.gpus=0.5", "training.zero_stage=0"],
            "training.zero_stage: 0, which cannot give up its optimizer's memory while the engines work "
            "(`placement.share`); set it to 1, 2 or 3",
        ),
        (
            "ppo",
            ["placement.share=[[policy, rollout]]", "rollout.engines=1", "rollout.min_engines=1"],
            "rollout.min_engines: given, but engines that share GPUs start all together; remove it",
        ),
        (
            "ppo",
            ["placement.share=[[policy, rollout]]", "rollout.tensor_parallel=2", "rollout.nodes_per_engine=2"],
            "rollout.nodes_per_engine: 2, but an engine that shares (`placement.share`) is on one node; set it to 1",
        ),
        (
            "ppo",
            ["rollout.tensor_parallel=4", "rollout.nodes_per_engine=3"],
            "rollout.nodes_per_engine: 3 does not divide `rollout.tensor_parallel` 4, and every node takes an equal "
            "part of an engine; set it to a divisor",
        ),
        ("dpo", ["model.path=''"], "model.path: not given; set it to a model folder or hub name"),
        (
            "sft",
            ["model.path=", "model.scratch.max_length=512"],
            "data.max_tokens: 1024 is more than the 512 of `model.scratch.max_length`; lower it or raise the latter",
        ),
        (
            "sft",
            ["training.micro_batch_tokens=1000"],
            "training.micro_batch_tokens: 1000 cannot hold the longest sequence of 1024 "
            "tokens; raise it to 1024 or "
            "lower `data.max_tokens`",
        ),
        (
            "reward",
            ["training.micro_batch_tokens=2000"],
            "training.micro_batch_tokens: 2000 cannot hold the longest pair of 2048 tokens; "
            "raise it to 2048 or "
            "lower `data.max_tokens`",
        ),
        (
            "dpo",
            ["training.micro_batch_tokens=2047"],
            "training.micro_batch_tokens: 2047 cannot hold the longest pair of 2048 tokens; "
            "raise it to 2048 or "
            "lower `data.max_tokens`",
        ),
        (
            "sft",
            ["training.zero_stage=0", "training.offload_optimizer=true"],
            "training.offload_optimizer: true with `training.zero_stage` 0, which cannot; set the latter to 1, 2 or 3",
        ),
        (
            "sft",
            ["training.zero_stage=3", "training.compile=true"],
            "training.compile: true with `training.zero_stage` 3, which gathers weights whenever a module is called, "
            "and compiled layers call none; set the latter to 2 or less, or this to false",
        ),
        (
            "sft",
            ["training.attention=flash_attention_2"],
            "training.attention: flash_attention_2 with `training.dtype` fp32, which it does not compute; set the "
            "latter to bf16",
        ),
        (
            "sft",
            ["group.processes=2", "group.gpus=1.5"],
            "group.gpus: 1.5, but a process drives one GPU at most; set it to 1 and `group.processes` to 3",
        ),
        (
            "sft",
            ["group.cpus=0"],
            "group.cpus: 0, and so is `group.gpus`; a process must take some of either, such as 0.1 of a core",
        ),
        (
            "dpo",
            ["dpo.loss=ipo", "dpo.label_smoothing=0.1"],
            "dpo.label_smoothing: 0.1 means nothing to `dpo.loss` ipo; set it to 0",
        ),
        (
            "ppo",
            ["ppo.kl_estimator=k3"],
            "ppo.kl_estimator: k3 with `ppo.kl_placement` reward, where a token's penalty is "
            "its log-ratio; "
            "set it to k1, or the latter to loss",
        ),
        (
            "ppo",
            ["ppo.kl_target=6", "ppo.kl_coef=0"],
            "ppo.kl_coef: 0 cannot adapt to `ppo.kl_target` 6; set it above 0, or the latter to null",
        ),
        (
            "ppo",
            ["ppo.kl_target=6", "ppo.kl_horizon=1", "ppo.prompts_per_iteration=5"],
            "ppo.kl_horizon: 1 is so short that one iteration of 5 responses can take "
            "`ppo.kl_coef` to zero; "
            "set it to 5 or more",
        ),
        (
            "ppo",
            ["ppo.spare_prompts=3"],
            "ppo.spare_prompts: 3, but no response is left out, as no reward function has a `min_scored` below 1; "
            "set one, or this to 0",
        ),
        (
            "ppo",
            ["ppo.ptx_coef=0.1"],
            "ppo.ptx_path: not given, but `ppo.ptx_coef` is 0.1; set it, or the latter to 0",
        ),
        (
            "ppo",
            ["ppo.ptx_path=demos.jsonl"],
            "ppo.ptx_coef: 0, but `ppo.ptx_path` is given; set it above 0, or the latter to null",
        ),
        (
            "ppo",
            ["ppo.minibatches=3"],
            "ppo.minibatches: 3 does not divide the 8 responses of an iteration "
            "(`ppo.prompts_per_iteration` times "
            "`rollout.samples_per_prompt`); choose a divisor of them",
        ),
        (
            "ppo",
            ["ppo.minibatches=32", "rollout.samples_per_prompt=2"],
            "ppo.minibatches: 32 does not divide the 16 responses of an iteration "
            "(`ppo.prompts_per_iteration` "
            "times `rollout.samples_per_prompt`); choose a divisor of them",
        ),
        (
            "ppo",
            ["critic.warmup_iterations=10"],
            "critic.warmup_iterations: 10 leaves none of the 10 of `ppo.iterations` to train the policy; lower it",
        ),
        (
            "ppo",
            ["training.warmup_steps=40", "ppo.epochs=2", "ppo.minibatches=2"],
            "training.warmup_steps: 40 is not below the 40 optimizer steps of the run "
            "(`ppo.iterations` times "
            "`ppo.epochs` times `ppo.minibatches`); lower it",
        ),
        (
            "ppo",
            ["reference.micro_batch_tokens=1279"],
            "reference.micro_batch_tokens: 1279 cannot hold the longest sequence of 1280 "
            "tokens (`data.max_tokens` "
            "plus `rollout.max_new_tokens`); raise it to 1280 or lower these",
        ),
        ("ppo", ["policy.path=''"], "policy.path: not given; set it to a model folder or hub name"),
        (
            "ppo",
            ["reward.models=[]"],
            "reward.models: empty, and so is `reward.functions`; name at least one of either",
        ),
        (
            "ppo",
            ["reward.models=[]", "reward.functions=[{path: 'a:b'}]"],
            "critic.init: reward, but `reward.models` is empty; set it to policy or to a model folder",
        ),
        (
            "ppo",
            [
                "reward.models=[]",
                "reward.functions=[{path: 'a:b'}]",
                "critic.init=policy",
                "reward.normalize=model",
            ],
            "reward.normalize: model, but `reward.models` is empty; set it to running or none",
        ),
        (
            "ppo",
            ["reward.models=[]", "reward.functions=[{path: 'a:b'}]", "critic.init=policy", "reward.gpus=0.5"],
            "reward.gpus: 0.5, but `reward.models` is empty and functions use none; set it to 0",
        ),
        (
            "ppo",
            ["reward.functions.0.path=package.module.function"],
            "reward.functions.0.path: 'package.module.function' names no function; write package.module:function",
        ),
        (
            "ppo",
            ["rollout.temperature=0"],
            "rollout.temperature: 0 samples greedily, which cannot train; set it above 0, usually to 1",
        ),
        (
            "ppo",
            ["rollout.kv_cache_gib="],
            "rollout.kv_cache_gib: not given, and needed on CPU (`rollout.gpus` 0); set it, for example to 0.5",
        ),
        (
            "ppo",
            ["rollout.gpus=0.5", "rollout.tensor_parallel=2"],
            "rollout.gpus: 0.5 with `rollout.tensor_parallel` 2, and a split engine takes "
            "whole GPUs; set it to 1 "
            "(it counts per rank) or the latter to 1",
        ),
        ("ppo", ["rollout.gpus=2"], "rollout.gpus: found 2, expected a value less than or equal to 1"),
    ],
)
def test_a_contradiction_names_the_keys_and_the_change(kind, overrides, message):
    told = problem(kind, *overrides)
    assert re.sub(r"^\d+ problems:\n  |(?<=\n)  ", "", told) == message


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("sft", ["training.micro_batch_tokens=1024"]),
        ("dpo", ["training.micro_batch_tokens=2048"]),
        ("dpo", ["dpo.label_smoothing=0.1"]),
        ("ppo", ["ppo.kl_placement=loss", "ppo.kl_estimator=k2"]),
        ("ppo", ["ppo.kl_target=6", "ppo.kl_horizon=2"]),
        ("ppo", ["ppo.ptx_path=demos.jsonl", "ppo.ptx_coef=0.1"]),
        ("ppo", ["ppo.minibatches=8"]),
        ("ppo", ["critic.warmup_iterations=9", "training.warmup_steps=9"]),
        ("ppo", ["reference.micro_batch_tokens=1280"]),
        ("ppo", ["reward.models=[]", "reward.functions=[{path: 'a:b'}]", "critic.init=policy"]),
        ("ppo", ["rollout.gpus=1", "rollout.tensor_parallel=2", "rollout.kv_cache_gib="]),
        ("ppo", ["policy.gpus=1", "reference.gpus=0.5", "reward.gpus=0"]),
    ],
)
def test_values_at_the_edge_of_a_contradiction_are_taken(kind, overrides):
    assert isinstance(from_dict(VALUES[kind], kind, overrides), CONFIGS[kind])


# Pipelines


OUTPUTS = {"sft": "out/sft", "reward": "out/reward", "dpo": "out/dpo"}


def test_a_stage_of_a_pipeline_becomes_a_configuration_of_its_own():
    pipeline = from_dict(PIPELINE, "pipeline")
    config = pipeline.stage_config("sft", {})
    assert isinstance(config, SFTConfig)
    assert config.run.dir == "runs/x/sft"
    assert config.run.seed == 3
    assert config.data.path == "demos.jsonl"
    assert config.model.path is None


def test_earlier_stages_supply_the_models_that_later_ones_leave_out():
    pipeline = from_dict(PIPELINE, "pipeline")
    reward = pipeline.stage_config("reward", OUTPUTS)
    dpo = pipeline.stage_config("dpo", OUTPUTS)
    ppo = pipeline.stage_config("ppo", OUTPUTS)
    assert isinstance(reward, RewardConfig) and reward.model.path == "out/sft"
    assert isinstance(dpo, DPOConfig) and dpo.model.path == "out/sft"
    assert isinstance(ppo, PPOConfig) and ppo.policy.path == "out/sft"
    assert [model.path for model in ppo.reward.models] == ["out/reward"]
    assert ppo.critic.init == "reward"


def test_models_that_a_stage_names_stay():
    pipeline = from_dict(
        PIPELINE,
        "pipeline",
        ["reward.model.scratch={}", "dpo.model.path=a", "ppo.policy.path=b", "ppo.reward.models=[{path: c}]"],
    )
    reward = pipeline.stage_config("reward", OUTPUTS)
    dpo = pipeline.stage_config("dpo", OUTPUTS)
    ppo = pipeline.stage_config("ppo", OUTPUTS)
    assert isinstance(reward, RewardConfig) and reward.model.path is None
    assert isinstance(dpo, DPOConfig) and dpo.model.path == "a"
    assert isinstance(ppo, PPOConfig) and ppo.policy.path == "b"
    assert [model.path for model in ppo.reward.models] == ["c"]


def test_asking_for_a_stage_changes_nothing():
    pipeline = from_dict(PIPELINE, "pipeline")
    pipeline.stage_config("ppo", OUTPUTS)
    assert pipeline == from_dict(PIPELINE, "pipeline")


@pytest.mark.parametrize("name", ["run", "other", "ppo"])
def test_a_stage_without_a_section_is_refused(name):
    pipeline = from_dict(PIPELINE, "pipeline", ["ppo=", "stages=[sft]"])
    with pytest.raises(KeyError):
        pipeline.stage_config(name, OUTPUTS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages=[reward, sft]"],
            "reward.model.path: not given; set it to a model folder or hub name, or fill `reward.model.scratch`",
        ),
        (
            ["stages=[sft, ppo]"],
            "ppo.reward.models: empty, and so is `ppo.reward.functions`; name at least one of either",
        ),
        (["stages=[sft, sft]"], "stages: names sft twice; name each stage once"),
        (["dpo="], "dpo: not given, but `stages` names it; add the section or take the stage out"),
        (
            ["ppo.ppo.kl_estimator=k2"],
            "ppo.ppo.kl_estimator: k2 with `ppo.ppo.kl_placement` reward, where a token's "
            "penalty is its log-ratio; "
            "set it to k1, or the latter to loss",
        ),
        (
            ["ppo.data.max_tokens=8000"],
            "2 problems:\n"
            + "\n".join(
                f"  ppo.{name}.micro_batch_tokens: 8192 cannot hold the longest sequence of 8256 tokens "
                "(`ppo.data.max_tokens` plus `ppo.rollout.max_new_tokens`); raise it to 8256 or "
                "lower these"
                for name in ("training", "reference")
            ),
        ),
        (["stages=[]"], "stages: found [], expected at least one item"),
        (
            ["stages=[sft, rm]"],
            "stages.1: found \"rm\", expected 'sft', 'reward', 'dpo' or 'ppo'",
        ),
    ],
)
def test_a_pipeline_that_cannot_run_is_refused_with_full_keys(overrides, message):
    assert problem("pipeline", *overrides) == message


def test_stages_that_are_not_run_may_stay_in_the_file():
    assert from_dict(PIPELINE, "pipeline", ["stages=[sft]"]).stages == ["sft"]
