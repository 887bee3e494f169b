"""What a configuration needs of a cluster, as far as the doctor looks at it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml

from rlhf_ray.config import PipelineConfig, PPOConfig, load_config
from rlhf_ray.config.load import Kind
from rlhf_ray.config.pipeline import StageConfig
from rlhf_ray.config.yaml_rules import parse_yaml
from rlhf_ray.errors import ConfigError
from rlhf_ray.names import is_hub_name
from rlhf_ray.placement.plan import Plan, make_plan

# The sections by which a configuration's kind is known, the telling ones first.
KINDS = {"stages": "pipeline", "rollout": "ppo", "dpo": "dpo", "reward_model": "reward", "sft": "sft"}


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
    kind = _kind(path)
    config = load_config(path, overrides, kind)
    stages: dict[str, StageConfig] = {}
    made: dict[str, str] = {}  # model folders that stages leave to those after them
    if isinstance(config, PipelineConfig):
        for name in config.stages:
            stages[name] = config.stage_config(name, made)
            made[name] = str(Path(stages[name].run.dir, "model"))
    else:
        stages[kind] = config
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
        models={model: not is_hub_name(model) for model in models},
        gpu_share=max(shares, default=None),
    )


def _kind(path: Path) -> Kind:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return "sft"  # loading it says what is wrong
    for section, kind in KINDS.items():
        if isinstance(values, dict) and section in values:
            return cast(Kind, kind)
    raise ConfigError(f"{path}: no section tells what this configures; add one of {', '.join(KINDS)}, `{{}}` if empty")


def _models(config: StageConfig) -> list[str]:
    """The models that a stage reads."""
    if not isinstance(config, PPOConfig):
        return [config.model.path] if config.model.path else []
    named = [config.policy.path, *(item.path for item in config.reward.models)]
    return named if config.critic.init in ("policy", "reward") else [*named, config.critic.init]
