"""A trainer group whose processes outlive the trainers in them."""

import gc
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from rlhf_ray.placement.groups import reserve
from rlhf_ray.placement.plan import Plan
from rlhf_ray.runtime.patience import Patience
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.training.group import TrainerGroup
from rlhf_ray.training.trainer import TrainerSpec

TIMEOUT_S = 120.0


class Ranks:
    """A trainer group of fixed size; `build` replaces the trainer in its processes, which take seconds to start."""

    def __init__(self, spec: TrainerSpec, world_size: int, folder: Path, stack: ExitStack) -> None:
        name = f"{folder.name}-{world_size}"
        plan = Plan([{"CPU": 0.25}] * world_size, {name: list(range(world_size))})
        placement = stack.enter_context(reserve(plan, folder))
        supervisor = stack.enter_context(Supervisor(folder.parent, Patience(TIMEOUT_S, TIMEOUT_S)))
        self.group = TrainerGroup(spec, placement, name, supervisor)
        stack.callback(self.group.stop)
        self.group.start().result()

    def build(self, spec: TrainerSpec) -> TrainerGroup:
        """The group, its processes holding a new trainer."""

        def replace(actor: Any) -> None:
            from rlhf_ray.training.trainer import Trainer

            actor._spec, actor._trainer = spec, None
            gc.collect()
            actor._trainer = Trainer(spec)

        self._on_all(replace)
        self.group.spec, self.group.token_budget = spec, spec.section.micro_batch_tokens
        return self.group

    def weights(self) -> dict[str, Tensor]:
        """All parameters by their transformers names, gathered from the ranks."""

        def read(actor: Any) -> dict[str, Tensor]:
            return actor.trainer.full_state_dict()

        return self._on_all(read)[0]

    def _on_all(self, function: Callable[[Any], Any]) -> list[Any]:
        return ray.get([actor.__ray_call__.remote(function) for actor in self.group._actors], timeout=TIMEOUT_S)
