"""Several stages in one go, each starting from the last one's output; a second call continues where it stopped."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_ray.config.pipeline import PipelineConfig
from rlhf_ray.names import model_folder
from rlhf_ray.runtime.cluster import connection
from rlhf_ray.stages.dpo import train_dpo
from rlhf_ray.stages.ppo import train_ppo
from rlhf_ray.stages.reward_model import train_reward_model
from rlhf_ray.stages.run import is_finished
from rlhf_ray.stages.sft import train_sft

logger = logging.getLogger(__name__)

STAGES: dict[str, Callable[[Any], Path]] = {
    "sft": train_sft,
    "reward": train_reward_model,
    "dpo": train_dpo,
    "ppo": train_ppo,
}


def run_pipeline(config: PipelineConfig) -> dict[str, Path]:
    """Run the stages in order; returns the model folder of each.

    Finished stages are passed over and an unfinished one continues from its checkpoint. All stages share one
    connection to Ray.

    Raises:
        RlhfError: see the classes in `errors`.
    """
    outputs: dict[str, Path] = {}
    unfinished = [name for name in config.stages if not is_finished(f"{config.run.dir}/{name}")]
    if not unfinished:
        logger.info("%s is finished already", config.run.dir)
        return {name: model_folder(f"{config.run.dir}/{name}") for name in config.stages}
    with connection(config.run.ray_address):
        for name in config.stages:
            stage = config.stage_config(name, {done: str(path) for done, path in outputs.items()})
            outputs[name] = STAGES[name](stage)
    return outputs
