"""What a configuration needs of a cluster, as far as the doctor looks at it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config import PipelineConfig, PPOConfig
from rlhf_ray.config.load import load_any
from rlhf_ray.config.pipeline import StageConfig, stage_name
from rlhf_ray.names import is_hub_name, on_disk
from rlhf_ray.placement.plan import Plan, make_plan


@dataclass(frozen=True)
class Needs:
    """What a run needs.

    Attributes:
        run_dir: absolute path of the run directory.
        ray_address: `run.ray_address`.
        wandb: whether metrics go to Weights & Biases as they come.
        plans: what goes where, by stage.
        models: names of the models that exist before the run; whether each is a folder.
        gpu_share: share of a GPU's memory that an engine takes; None where none uses GPUs.
    """

    run_dir: Path
    ray_address: str | None
    wandb: bool
    plans: dict[str, Plan]
    models: dict[str, bool]
    gpu_share: float | None

    @property
    def gpus(self) -> bool:
        """Whether any process takes a GPU."""
        return any(plan.needed("GPU") for plan in self.plans.values())


def read_needs(path: Path, overrides: Sequence[str]) -> Needs:
    """The needs of a configuration file; what it configures is told by its sections.

    Raises:
        ConfigError: it cannot be read or is wrong.
    """
    config = load_any(path, overrides)
    stages: dict[str, StageConfig] = {}
    made: dict[str, str] = {}  # model folders that stages leave to those after them
    if isinstance(config, PipelineConfig):
        for name in config.stages:
            stages[name] = config.stage_config(name, made)
            made[name] = str(Path(stages[name].run.dir, "model"))
    else:
        stages[stage_name(config)] = config
    models = [model for stage in stages.values() for model in _models(stage) if model not in made.values()]
    shares = [
        stage.rollout.gpu_memory_utilization
        for stage in stages.values()
        if isinstance(stage, PPOConfig) and stage.rollout.gpus and stage.rollout.kv_cache_gib is None
    ]
    return Needs(
        run_dir=Path(config.run.dir).absolute(),
        ray_address=config.run.ray_address,
        wandb=config.tracking.wandb == "online",
        plans={name: make_plan(stage) for name, stage in stages.items()},
        models={on_disk(model): not is_hub_name(model) for model in models},
        gpu_share=max(shares, default=None),
    )


def _models(config: StageConfig) -> list[str]:
    """The models that a stage reads."""
    if not isinstance(config, PPOConfig):
        return [config.model.path] if config.model.path else []
    named = [config.policy.path, *(item.path for item in config.reward.models)]
    return named if config.critic.init in ("policy", "reward") else [*named, config.critic.init]
