"""The configuration of a pipeline: several stages, each fed by those before it."""

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from rlhf_ray.config.offline import DPOConfig, DPOStage, RewardConfig, RewardStage, SFTConfig, SFTStage
from rlhf_ray.config.ppo import PPOConfig, PPOStage
from rlhf_ray.config.problems import Problems
from rlhf_ray.config.sections import RunConfig

StageName = Literal["sft", "reward", "dpo", "ppo"]
StageConfig = SFTConfig | RewardConfig | DPOConfig | PPOConfig

STAGE_CONFIGS: dict[str, type[SFTConfig] | type[RewardConfig] | type[DPOConfig] | type[PPOConfig]] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "ppo": PPOConfig,
}


def stage_name(config: StageConfig) -> str:
    """The stage that a configuration is of."""
    return next(name for name, known in STAGE_CONFIGS.items() if isinstance(config, known))


class PipelineConfig(RunConfig):
    """A run of several stages."""

    groups: ClassVar[tuple[str, ...]] = (*PPOConfig.groups, *RunConfig.groups)

    stages: list[StageName] = Field(min_length=1, description="Stages to run, in this order.")
    sft: SFTStage | None = Field(default=None, description="Supervised fine-tuning.")
    reward: RewardStage | None = Field(default=None, description="Reward modelling.")
    dpo: DPOStage | None = Field(default=None, description="Direct preference optimization.")
    ppo: PPOStage | None = Field(default=None, description="Proximal policy optimization.")

    @model_validator(mode="after")
    def _check(self):
        problems = Problems()
        outputs: dict[str, str] = {}
        for name in self.stages:
            if name in outputs:
                problems.add("stages", f"names {name} twice; name each stage once")
            elif getattr(self, name) is None:
                problems.add(name, "not given, but `stages` names it; add the section or take the stage out")
            else:
                try:
                    self.stage_config(name, outputs)
                except ValidationError as error:
                    problems.add_below((name,), error)
            outputs[name] = name
        problems.check()
        return self

    def stage_config(self, name: str, outputs: dict[str, str]) -> StageConfig:
        """The configuration of one stage as if it were run alone.

        Args:
            name: the stage, one with a section in this configuration.
            outputs: the model folder that each finished stage has left. They fill what the stage leaves out:
                `sft` the model of `reward` and `dpo` and the policy of `ppo`; `reward` the reward model of
                `ppo`.

        Raises:
            KeyError: the stage has no section.
        """
        section = getattr(self, name, None) if name in STAGE_CONFIGS else None
        if section is None:
            raise KeyError(name)
        values: dict[str, Any] = section.model_dump()
        folder = f"{self.run.dir.rstrip('/')}/{name}"
        values["run"] = {**self.run.model_dump(), "dir": folder}
        values["tracking"] = self.tracking.model_dump()
        values["placement"] = self.placement.of(STAGE_CONFIGS[name].groups).model_dump()
        if "sft" in outputs and name != "sft":
            model = values["policy" if name == "ppo" else "model"]
            if not model["path"] and not model.get("scratch"):
                model["path"] = outputs["sft"]
        if "reward" in outputs and name == "ppo" and not values["reward"]["models"]:
            values["reward"]["models"] = [{"path": outputs["reward"]}]
        return STAGE_CONFIGS[name].model_validate(values)
