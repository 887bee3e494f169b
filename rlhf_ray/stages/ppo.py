"""PPO from a policy, reward models or functions, and prompts to a trained policy."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.data import demonstration_sequences, prompt_items, read_rows
from rlhf_ray.driver.groups import critic_model, running_groups
from rlhf_ray.driver.ppo import PPOLoop
from rlhf_ray.driver.rollouts import set_aside
from rlhf_ray.errors import ModelError
from rlhf_ray.models.loading import check_same_vocabulary, load_config, load_tokenizer
from rlhf_ray.models.saving import ModelCard
from rlhf_ray.packing import Sequence
from rlhf_ray.rollout.options import check_options
from rlhf_ray.runtime.chaos import reached
from rlhf_ray.scoring.actors import import_function
from rlhf_ray.stages.models import check_context, prepare_tokenizer
from rlhf_ray.stages.restarts import starts_again
from rlhf_ray.stages.run import finished_model, open_run
from rlhf_ray.stages.training import paths

logger = logging.getLogger(__name__)


@starts_again
def train_ppo(config: PPOConfig) -> Path:
    """Train the policy against its rewards; returns the folder of the result.

    A run directory that holds an unfinished run is continued, a finished one is left as it is.

    Raises:
        RlhfError: see the classes in `errors`.
    """
    finished = finished_model(config, "ppo")
    if finished is not None:
        return finished
    data = config.data
    rows = read_rows(data.path, split=data.split, columns=data.columns, limit=data.limit, on_malformed=data.malformed)
    with open_run(config, "ppo") as run:
        run_dir = run.directory.path
        tokenizer, tokenizer_folder = prepare_tokenizer(config.policy.path, config.policy, run_dir)
        check_models(config, tokenizer)
        prompts, report = prompt_items(rows, tokenizer, data.max_tokens, data.overlong, data.as_chat, data.malformed)
        logger.info("prompts: %s", report)
        prompts, spares = set_aside(prompts, config.ppo.spare_prompts, config.run.seed)
        ptx = read_ptx(config, tokenizer)
        with running_groups(config, tokenizer, tokenizer_folder, run.directory.logs) as groups:
            PPOLoop(config, run, groups, prompts, ptx, spares).train()
            # Of the file, because a run that died after its last iteration has none left to do.
            last = run.directory.read_metrics()[-1]
            final: dict[str, Any] = {name: last.get(name) for name in ("objective/scores", "objective/kl")}
            card = ModelCard(
                title=run_dir.name,
                method="PPO",
                base_model=config.policy.path,
                datasets=paths(data.path),
                summary={"iterations": config.ppo.iterations, "prompts": len(prompts), **final},
            )
            groups.policy.export(str(run.model_folder), tokenizer_folder, card).result()
            reached("export")
            groups.critic.export(str(run_dir / "critic"), tokenizer_folder, card).result()
        run.finish({"iterations": config.ppo.iterations, "prompts": len(prompts), **final})
        return run.model_folder


def check_models(config: PPOConfig, tokenizer: Any) -> None:
    """Refuse models that cannot work together, before any actor starts.

    Raises:
        ConfigError: prompts and responses do not fit a model's context, a reward function cannot be imported, or the
            installed vLLM has no such option.
        ModelError: a reward model is missing or lacks the statistics that are asked for, or the critic does not
            read the policy's tokens.
    """
    check_options(config.rollout.vllm, gpu=config.rollout.gpus > 0)
    trust = config.policy.trust_remote_code
    for function in config.reward.functions:
        import_function(function.path)
    for item in config.reward.models:
        reward = load_config(item.path, trust_remote_code=trust)
        if config.reward.normalize == "model" and not hasattr(reward, "score_std"):
            raise ModelError(
                f"reward.normalize: model, but {item.path} was saved without score_mean and score_std. "
                "Train it with `rlhf-ray reward`, which saves them, or set reward.normalize to running or none"
            )
    longest = config.data.max_tokens + config.rollout.max_new_tokens
    keys = "data.max_tokens + rollout.max_new_tokens"
    check_context(config.policy.path, longest, keys, trust)
    critic = critic_model(config)
    check_context(critic, longest, keys, trust)
    check_same_vocabulary(
        tokenizer, load_tokenizer(critic, trust_remote_code=trust), names=(config.policy.path, critic)
    )


def read_ptx(config: PPOConfig, tokenizer: Any) -> list[Sequence]:
    """Demonstrations of the pretraining mix, with the token fields that responses have; empty without one."""
    if config.ppo.ptx_path is None:
        return []
    import torch

    data = config.data
    longest = data.max_tokens + config.rollout.max_new_tokens
    sequences, report = demonstration_sequences(
        read_rows(config.ppo.ptx_path, split=data.split, on_malformed=data.malformed),
        tokenizer,
        longest,
        data.overlong,
        data.as_chat,
        data.malformed,
    )
    logger.info("demonstrations for the pretraining mix: %s", report)
    names = ("advantages", "old_logprobs", "ref_logprobs", "engine_logprobs")
    return [
        dataclasses.replace(
            sequence, token_fields={name: torch.zeros(len(sequence)) for name in names}, fields={"ptx": 1.0}
        )
        for sequence in sequences
    ]
