"""Engines and trainers that share GPUs work in turns: whoever rests gives its memory to the others."""

import logging
from collections.abc import Mapping

from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.sharing import trains_beside_engines
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.training.group import TrainerGroup

logger = logging.getLogger(__name__)


def takes_turns(config: PPOConfig) -> bool:
    """Whether the engines share GPUs with a trainer."""
    return any(trains_beside_engines(config, together) for together in config.placement.share)


class Turns:
    """Whose turn it is.

    Engines that rest sleep: they drop weights and cache, and the next transfer brings the weights. Trainers that rest
    keep their weights, which score and are sent, and move the optimizer's states to main memory. Where nobody shares a
    GPU with the engines, both methods do nothing.
    """

    def __init__(self, config: PPOConfig, trainers: Mapping[str, TrainerGroup], rollout: RolloutPool) -> None:
        partners = config.placement.partners("rollout")
        self.taken = takes_turns(config)  # whether anybody ever rests
        self._trainers = [trainer for name, trainer in trainers.items() if name in partners] if self.taken else []
        self._rollout = rollout
        if partners and not config.rollout.gpus:
            logger.warning("rollout shares its place with %s; on a CPU engines do not sleep", ", ".join(partners))

    def to_engines(self) -> None:
        """Trainers give up their optimizers' memory. The engines wake as the next transfer reaches them."""
        for pending in [trainer.free_optimizer() for trainer in self._trainers]:
            pending.result()

    def to_trainers(self) -> None:
        """Engines sleep; then the trainers take their optimizers back."""
        if self.taken:
            self._rollout.sleep()
        for pending in [trainer.restore_optimizer() for trainer in self._trainers]:
            pending.result()
