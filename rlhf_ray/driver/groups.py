"""The five groups of a PPO run, from configuration to running actors."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.driver.turns import Turns, takes_turns
from rlhf_ray.names import on_disk
from rlhf_ray.placement.groups import Placement, reserve
from rlhf_ray.placement.plan import make_plan
from rlhf_ray.rollout.engine import EngineSpec
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.runtime.chaos import reached
from rlhf_ray.runtime.cluster import connection
from rlhf_ray.runtime.supervisor import Supervisor, supervisor_of
from rlhf_ray.scoring.scorer import Scorer
from rlhf_ray.tracking.stall import reporting_stalls
from rlhf_ray.tracking.status import forget
from rlhf_ray.training.group import TrainerGroup
from rlhf_ray.training.trainer import TrainerSpec

logger = logging.getLogger(__name__)

ENGINE_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass
class Groups:
    """Policy and critic trainers, rollout engines, the scorers (reference and rewards), whose turn it is, and who
    watches them all."""

    policy: TrainerGroup
    critic: TrainerGroup
    rollout: RolloutPool
    scorer: Scorer
    turns: Turns
    supervisor: Supervisor


@contextmanager
def running_groups(
    config: PPOConfig, tokenizer: Any, tokenizer_folder: str, logs: Path, *, to_the_limit: bool = False
) -> Iterator[Groups]:
    """All groups, connected for weight transfer; they are gone after the block.

    They start side by side, but for engines that share GPUs with trainers, which start last. Responses end at the
    end-of-sequence token, or at their limit alone if they are to go on `to_the_limit`, for measurements.

    Raises:
        ResourceError: the cluster cannot hold them.
        EngineError: one did not start.
    """
    with ExitStack() as stack:
        stack.enter_context(connection(config.run.ray_address))
        placement = stack.enter_context(reserve(make_plan(config), logs))
        supervisor = stack.enter_context(supervisor_of(config.run, logs))
        forget(logs.parent)
        rollout = RolloutPool(
            engine_spec(config, () if to_the_limit else (tokenizer.eos_token_id,)), placement, supervisor
        )
        stack.callback(rollout.stop)
        if not takes_turns(config):
            rollout.launch()
        policy = trainer_group(config, placement, "policy", supervisor)
        stack.callback(policy.stop)
        critic = trainer_group(config, placement, "critic", supervisor)
        stack.callback(critic.stop)
        scorer = Scorer(config, placement, critic, tokenizer, tokenizer_folder, supervisor)
        stack.callback(scorer.stop)
        with reporting_stalls(logs.parent):
            reached("start-up")
            for pending in (policy.start(), critic.start()):
                pending.result()
            scorer.start()
            turns = Turns(config, {"policy": policy, "critic": critic}, rollout)
            if turns.taken:
                # An engine counts as its own what others take of its GPU while it starts.
                turns.to_engines()
                rollout.launch()
            rollout.start()
            rollout.connect(policy)
            yield Groups(policy, critic, rollout, scorer, turns, supervisor)


def critic_model(config: PPOConfig) -> str:
    """The folder or hub name that the critic starts from."""
    named = {"policy": config.policy.path}
    if config.reward.models:
        named["reward"] = config.reward.models[0].path
    return named.get(config.critic.init, config.critic.init)


def policy_steps(config: PPOConfig) -> int:
    """Optimizer steps of the policy over the whole run."""
    trained = config.ppo.iterations - config.critic.warmup_iterations
    return trained * config.ppo.epochs * config.ppo.minibatches


def trainer_group(config: PPOConfig, placement: Placement, name: str, supervisor: Supervisor) -> TrainerGroup:
    """The trainer of "policy" or "critic", still to be started."""
    policy = name == "policy"
    section = config.policy if policy else config.critic
    spec = TrainerSpec(
        name=name,
        model=on_disk(config.policy.path if policy else critic_model(config)),
        head="causal" if policy else "scalar",
        section=config.training,
        learning_rate=section.learning_rate,
        total_steps=policy_steps(config)
        if policy
        else config.ppo.iterations * config.ppo.epochs * config.ppo.minibatches,
        seed=config.run.seed,
        gpu=section.gpus > 0,
        trust_remote_code=config.policy.trust_remote_code,
    )
    return TrainerGroup(spec, placement, name, supervisor)


def engine_spec(config: PPOConfig, eos_token_ids: tuple[int, ...]) -> EngineSpec:
    """What the rollout engines are started with."""
    rollout = config.rollout
    gpu = rollout.gpus > 0
    beside_policy = "policy" in config.placement.partners("rollout")
    return EngineSpec(
        model=on_disk(config.policy.path),
        dtype=ENGINE_DTYPES[rollout.dtype],
        max_model_len=config.data.max_tokens + rollout.max_new_tokens,
        eos_token_ids=eos_token_ids,
        tensor_parallel=rollout.tensor_parallel,
        nodes=rollout.nodes_per_engine,
        max_concurrency=rollout.max_concurrency,
        options=rollout.vllm,
        gpu=gpu,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        kv_cache_gib=rollout.kv_cache_gib,
        sleeps=takes_turns(config),
        trust_remote_code=config.policy.trust_remote_code,
        backend=("ipc" if beside_policy else "nccl") if gpu else "gloo",
    )
