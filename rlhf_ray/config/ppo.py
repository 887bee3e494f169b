"""The configuration of PPO."""

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.problems import Problems
from rlhf_ray.config.sections import (
    Dtype,
    PretrainedSection,
    ProcessesSection,
    RowsSection,
    RunConfig,
    Section,
    TrainingSection,
    check_takes_something,
    is_plain,
)
from rlhf_ray.config.sharing import check_sharing

# The adaptive controller clips its relative error to this much (Ziegler et al. 2019, section 2.2).
KL_ERROR_CLIP = 0.2


class PolicySection(PretrainedSection, ProcessesSection):
    """The policy and its training processes."""

    learning_rate: float = Field(default=1e-6, gt=0, description="Peak learning rate of the policy.")


class CriticSection(ProcessesSection):
    """The critic and its training processes."""

    init: str = Field(
        default="reward",
        min_length=1,
        description="What the critic starts from: `reward` (first reward model), `policy`, or a folder.",
    )
    learning_rate: float = Field(default=1e-5, gt=0, description="Peak learning rate of the critic.")
    warmup_iterations: int = Field(default=0, ge=0, description="First iterations that train the critic alone.")


class ReferenceSection(ProcessesSection):
    """The processes that compute reference log-probabilities."""

    dtype: Dtype = Field(default="fp32", description="Precision of the reference model and of reward models.")
    micro_batch_tokens: int = Field(
        default=8192, ge=2, description="Most tokens of one forward pass of these models, per process."
    )


class RewardModelItem(Section):
    """One reward model of the sum."""

    path: str = Field(min_length=1, description="Reward model folder or hub name.")
    weight: float = Field(default=1.0, description="Factor of this model's score in the sum.")


class RewardFunctionItem(Section):
    """One reward function of the sum."""

    path: str = Field(description="The Python function, as `package.module:function`.")
    weight: float = Field(default=1.0, description="Factor of this function's score in the sum.")
    timeout_s: float = Field(default=30.0, gt=0, description="Longest wait in seconds for one call.")
    min_scored: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Smallest share of an iteration's responses that it must score: fewer stop the run, and those that "
        "it failed on are left out of training; 1 stops at the first failure.",
    )

    @model_validator(mode="after")
    def _check(self):
        problems = Problems()
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", self.path):
            problems.add("path", f"{self.path!r} names no function; write package.module:function")
        problems.check()
        return self


class RewardScoringSection(ProcessesSection):
    """What a response is worth, and the processes that score it."""

    models: list[RewardModelItem] = Field(default_factory=list, description="Reward models of the weighted sum.")
    functions: list[RewardFunctionItem] = Field(default_factory=list, description="Reward functions of the sum.")
    normalize: Literal["model", "running", "none"] = Field(
        default="none",
        description="Statistics that centre and scale scores: stored with each model, running ones, or none.",
    )
    clip: float | None = Field(
        default=None, gt=0, description="Largest absolute score after normalization; none clips nothing."
    )
    missing_eos_penalty: float = Field(
        default=0.0, ge=0, description="Subtracted from the score of a response cut at its limit."
    )


class RolloutSection(Section):
    """The vLLM engines and how they sample."""

    engines: int = Field(default=1, ge=1, description="Engines, each with a copy of the policy.")
    min_engines: int | None = Field(
        default=None,
        ge=1,
        description="Engines that are enough to start with, the others joining as nodes have room; none waits for all.",
    )
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs over which each engine splits the model.")
    nodes_per_engine: int = Field(
        default=1,
        ge=1,
        description="Nodes over which each engine is split, with an equal part of `tensor_parallel` on each.",
    )
    cpus: float = Field(default=1.0, ge=0, description="CPU cores per engine, on each of its nodes.")
    gpus: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="GPUs per tensor-parallel rank: 0 for CPU, 1, or a fraction to share one.",
    )
    dtype: Dtype = Field(default="fp32", description="Precision of the engine's weights and cache.")
    max_concurrency: int = Field(default=64, ge=1, description="Most responses that one engine samples at a time.")
    kv_cache_gib: float | None = Field(
        default=None,
        gt=0,
        description="Key-value cache in GiB, required on CPU; none uses `gpu_memory_utilization`.",
    )
    gpu_memory_utilization: float = Field(
        default=0.85, gt=0, le=1, description="Share of a GPU's memory that an engine takes."
    )
    vllm: dict[str, Any] = Field(
        default_factory=dict,
        description="Further engine arguments of vLLM, such as `{enforce_eager: true}`: quick start, slow steps.",
    )
    max_new_tokens: int = Field(default=256, ge=1, description="Longest response in tokens.")
    temperature: float = Field(
        default=1.0, ge=0, description="Sampling temperature, also that of every log-probability."
    )
    samples_per_prompt: int = Field(default=1, ge=1, description="Responses sampled per prompt.")

    @model_validator(mode="after")
    def _check(self):
        problems = Problems()
        check_takes_something(problems, self.cpus, self.gpus)
        if self.min_engines is not None and self.min_engines > self.engines:
            problems.add("min_engines", f"{self.min_engines} is more than `engines` {self.engines}; lower it")
        if not is_plain(self.vllm):
            problems.add(
                "vllm",
                "holds what is no text, number of 64 bits, truth value, list or mapping of at most 20 levels; write it "
                "as in YAML",
            )
        if self.temperature == 0:
            problems.add("temperature", "0 samples greedily, which cannot train; set it above 0, usually to 1")
        if self.gpus == 0 and self.kv_cache_gib is None:
            problems.add("kv_cache_gib", "not given, and needed on CPU (`gpus` 0); set it, for example to 0.5")
        if self.tensor_parallel % self.nodes_per_engine:
            problems.add(
                "nodes_per_engine",
                f"{self.nodes_per_engine} does not divide `tensor_parallel` {self.tensor_parallel}, and every node "
                "takes an equal part of an engine; set it to a divisor",
            )
        if self.tensor_parallel > 1 and 0 < self.gpus < 1:
            problems.add(
                "gpus",
                f"{self.gpus:g} with `tensor_parallel` {self.tensor_parallel}, and a split engine takes "
                "whole GPUs; set it to 1 (it counts per rank) or the latter to 1",
            )
        problems.check()
        return self


class PPOSection(Section):
    """Proximal policy optimization."""

    iterations: int = Field(ge=1, description="Rounds of sampling and training.")
    prompts_per_iteration: int = Field(ge=1, description="Prompts sampled in one iteration.")
    epochs: int = Field(default=1, ge=1, description="Passes over the responses of one iteration.")
    minibatches: int = Field(default=1, ge=1, description="Optimizer steps per pass.")
    kl_placement: Literal["reward", "loss"] = Field(
        default="reward",
        description="Whether the KL penalty is taken off each token's reward or added to the loss.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k1", description="Estimator of the KL divergence from the reference (Schulman 2020)."
    )
    kl_coef: float = Field(default=0.05, ge=0, description="Weight of the KL penalty, the first one if it adapts.")
    kl_target: float | None = Field(
        default=None,
        gt=0,
        description="KL divergence per response that an adaptive weight steers to; none keeps it fixed.",
    )
    kl_horizon: int = Field(default=10000, ge=1, description="Responses over which the adaptive KL weight reacts.")
    gamma: float = Field(default=1.0, ge=0, le=1, description="Discount per token.")
    lam: float = Field(default=0.95, ge=0, le=1, description="Lambda of generalized advantage estimation.")
    clip_range: float = Field(
        default=0.2, gt=0, description="Distance from 1 at which the probability ratio is clipped."
    )
    clip_range_value: float = Field(
        default=0.2, gt=0, description="Most that a value may move from its old one unclipped."
    )
    whiten_advantages: bool = Field(
        default=True, description="Whether advantages get mean 0 and deviation 1 per iteration."
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="Most updates that a token's weights may lag behind those it trains; above 0, sampling runs ahead.",
    )
    importance_cap: float | None = Field(
        default=2.0,
        gt=1,
        description="Largest importance weight where `max_staleness` is above 0; none corrects nothing.",
    )
    spare_prompts: int = Field(
        default=0,
        ge=0,
        description="Prompts set aside, which take the place of responses that a reward function failed on; 0 leaves "
        "those out without another.",
    )
    entropy_coef: float = Field(default=0.0, ge=0, description="Weight of the entropy bonus.")
    ptx_coef: float = Field(default=0.0, ge=0, description="Weight of the language-modelling loss on `ptx_path`.")
    ptx_path: str | None = Field(
        default=None, min_length=1, description="Demonstrations mixed into the policy's training."
    )

    @model_validator(mode="after")
    def _check(self):
        problems = Problems()
        if self.kl_placement == "reward" and self.kl_estimator != "k1":
            problems.add(
                "kl_estimator",
                f"{self.kl_estimator} with `kl_placement` reward, where a token's penalty is its log-ratio; "
                "set it to k1, or the latter to loss",
            )
        if self.kl_target is not None and self.kl_coef == 0:
            problems.add(
                "kl_coef",
                f"0 cannot adapt to `kl_target` {self.kl_target:g}; set it above 0, or the latter to null",
            )
        if self.ptx_coef > 0 and self.ptx_path is None:
            problems.add("ptx_path", f"not given, but `ptx_coef` is {self.ptx_coef:g}; set it, or the latter to 0")
        if self.ptx_path is not None and self.ptx_coef == 0:
            problems.add("ptx_coef", "0, but `ptx_path` is given; set it above 0, or the latter to null")
        problems.check()
        return self


class PPOStage(Section):
    """Everything PPO needs but the run itself."""

    data: RowsSection = Field(description="Prompts.")
    policy: PolicySection = Field(default_factory=PolicySection, description="Policy.")
    critic: CriticSection = Field(default_factory=CriticSection, description="Critic.")
    training: TrainingSection = Field(default_factory=TrainingSection, description="Optimization of policy and critic.")
    reference: ReferenceSection = Field(default_factory=ReferenceSection, description="Reference model.")
    reward: RewardScoringSection = Field(default_factory=RewardScoringSection, description="Reward.")
    rollout: RolloutSection = Field(description="Sampling.")
    ppo: PPOSection = Field(description="Proximal policy optimization.")

    @model_validator(mode="after")
    def _check(self):
        problems = Problems()
        self._check_batch(problems)
        self._check_lengths(problems)
        self._check_warmup(problems)
        problems.check()
        return self

    def _check_batch(self, problems: Problems) -> None:
        samples = self.ppo.prompts_per_iteration * self.rollout.samples_per_prompt
        if samples % self.ppo.minibatches:
            problems.add(
                "ppo.minibatches",
                f"{self.ppo.minibatches} does not divide the {samples} responses of an iteration "
                "(`ppo.prompts_per_iteration` times `rollout.samples_per_prompt`); choose a divisor of them",
            )
        if self.ppo.kl_target is not None and self.ppo.kl_horizon <= KL_ERROR_CLIP * samples:
            problems.add(
                "ppo.kl_horizon",
                f"{self.ppo.kl_horizon} is so short that one iteration of {samples} responses can take "
                f"`ppo.kl_coef` to zero; set it to {samples} or more",
            )

    def _check_lengths(self, problems: Problems) -> None:
        longest = self.data.max_tokens + self.rollout.max_new_tokens
        budgets = {
            "training": self.training.micro_batch_tokens,
            "reference": self.reference.micro_batch_tokens,
        }
        for name, tokens in budgets.items():
            if tokens < longest:
                problems.add(
                    f"{name}.micro_batch_tokens",
                    f"{tokens} cannot hold the longest sequence of {longest} tokens (`data.max_tokens` plus "
                    f"`rollout.max_new_tokens`); raise it to {longest} or lower these",
                )

    def _check_warmup(self, problems: Problems) -> None:
        iterations, warmup = self.ppo.iterations, self.critic.warmup_iterations
        if warmup >= iterations:
            problems.add(
                "critic.warmup_iterations",
                f"{warmup} leaves none of the {iterations} of `ppo.iterations` to train the policy; lower it",
            )
        steps = iterations * self.ppo.epochs * self.ppo.minibatches
        if self.training.warmup_steps >= steps:
            problems.add(
                "training.warmup_steps",
                f"{self.training.warmup_steps} is not below the {steps} optimizer steps of the run "
                "(`ppo.iterations` times `ppo.epochs` times `ppo.minibatches`); lower it",
            )


class PPOConfig(PPOStage, RunConfig):
    """A run of PPO."""

    groups: ClassVar[tuple[str, ...]] = ("policy", "rollout", "reference", "reward", "critic")

    @model_validator(mode="after")
    def _check_config(self):
        problems = Problems()
        if not self.policy.path:
            problems.add("policy.path", "not given; set it to a model folder or hub name")
        if not self.reward.models:
            self._check_without_reward_model(problems)
        if self.ppo.spare_prompts and all(item.min_scored == 1 for item in self.reward.functions):
            problems.add(
                "ppo.spare_prompts",
                f"{self.ppo.spare_prompts}, but no response is left out, as no reward function has a `min_scored` "
                "below 1; set one, or this to 0",
            )
        check_sharing(self, problems)
        problems.check()
        return self

    def _check_without_reward_model(self, problems: Problems) -> None:
        if not self.reward.functions:
            problems.add("reward.models", "empty, and so is `reward.functions`; name at least one of either")
            return
        if self.critic.init == "reward":
            problems.add("critic.init", "reward, but `reward.models` is empty; set it to policy or to a model folder")
        if self.reward.normalize == "model":
            problems.add("reward.normalize", "model, but `reward.models` is empty; set it to running or none")
        if self.reward.gpus:
            problems.add(
                "reward.gpus",
                f"{self.reward.gpus:g}, but `reward.models` is empty and functions use none; set it to 0",
            )
