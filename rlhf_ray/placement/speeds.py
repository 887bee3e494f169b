"""How long each kind of work of a PPO run takes on one core or one GPU, from measured cells. Pure."""

from dataclasses import dataclass
from functools import cached_property

from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.errors import ModelError
from rlhf_ray.placement.cells import Cells, Device, Head, forward_flops, matrix_flops, step_flops
from rlhf_ray.placement.memory import BYTES, Shapes
from rlhf_ray.placement.shapes import ModelShape


@dataclass(frozen=True)
class Samples:
    """The responses of one iteration.

    Attributes:
        prompts: tokens of each prompt.
        responses: tokens of each response, those to the first prompt first, equally many to each.
    """

    prompts: list[int]
    responses: list[int]

    @property
    def each(self) -> int:
        """Responses to a prompt."""
        return len(self.responses) // len(self.prompts)

    @cached_property
    def sequences(self) -> list[tuple[int, int]]:
        """Tokens of prompt and response, for each response."""
        return [(self.prompts[index // self.each], response) for index, response in enumerate(self.responses)]


class Speeds:
    """Seconds that one core or GPU takes for each kind of work of a run."""

    def __init__(
        self, config: PPOConfig, samples: Samples, cells: Cells, shapes: Shapes, devices: dict[str, Device]
    ) -> None:
        self._config = config
        self._cells = cells
        self._devices = devices
        policy = _shape("policy.path", config.policy.path, shapes)
        rewards = [_shape(f"reward.models.{i}", item.path, shapes) for i, item in enumerate(config.reward.models)]
        named = {"policy": policy, **({"reward": rewards[0]} if rewards else {})}
        critic = named.get(config.critic.init) or _shape("critic.init", config.critic.init, shapes)
        dtype, recomputed = config.training.dtype, config.training.gradient_checkpointing
        causal = forward_flops(policy, "causal", samples.sequences)
        scalar = forward_flops(critic, "scalar", samples.sequences)
        rollout, device = config.rollout.dtype, devices["rollout"]
        self._decode = matrix_flops(policy, "causal")
        self.prompt_s = cells.seconds("prompt", "causal", rollout, device, self._decode)
        self.reference_s = cells.seconds("forward", "causal", config.reference.dtype, devices["reference"], causal)
        self.reward_s = sum(
            cells.seconds(
                "forward",
                "scalar",
                config.reference.dtype,
                devices["reward"],
                forward_flops(shape, "scalar", samples.sequences),
            )
            for shape in rewards
        )
        self.values_s = cells.seconds("forward", "scalar", dtype, devices["critic"], scalar)
        self.old_logprobs_s = 0.0
        if config.ppo.epochs * config.ppo.minibatches > 1:
            self.old_logprobs_s = cells.seconds("forward", "causal", dtype, devices["policy"], causal)
        self._steps: dict[str, tuple[Head, float]] = {
            "policy": ("causal", step_flops(causal, recomputed=recomputed)),
            "critic": ("scalar", step_flops(scalar, recomputed=recomputed)),
        }
        self.train_s = {
            name: cells.seconds("step", head, dtype, devices[name], size) for name, (head, size) in self._steps.items()
        }
        weights = policy.parameters * BYTES[rollout]
        self.transfer_s = cells.seconds("transfer", "causal", rollout, device, weights)
        self.driver_s = cells.overhead()

    def decode_s(self, at_once: int) -> float:
        """Of an engine's step."""
        rollout = self._config.rollout
        return self._cells.step_seconds(rollout.dtype, self._devices["rollout"], self._decode, at_once)

    def notes(self) -> list[str]:
        """What the estimate does not know or takes from afar."""
        config, found = self._config, []
        low, high = self._cells.sizes("step", "causal", config.training.dtype, self._devices["policy"])
        size = self._steps["policy"][1]
        if not 0.8 * low <= size <= 1.25 * high:
            nearest = low if size < low else high
            found.append(
                f"the policy takes {size / nearest:.2g} times the operations a token of the nearest model that was "
                "measured; time is taken in proportion to them"
            )
        least, most = self._cells.concurrency(config.rollout.dtype, self._devices["rollout"])
        if config.rollout.max_concurrency > most:
            found.append(
                f"engines were measured with {least if least == most else f'{least} to {most}'} responses at a time, "
                f"and rollout.max_concurrency is {config.rollout.max_concurrency}; beyond, a step's time is taken in "
                "proportion"
            )
        if config.reward.functions:
            found.append("the time of reward functions is not counted")
        if config.ppo.ptx_path:
            found.append("demonstrations of ppo.ptx_path are not counted")
        if config.placement.partners("rollout") and config.rollout.gpus:
            found.append("what moves to main memory and back as engines and trainers take turns is not counted")
        return found


def _shape(key: str, name: str, shapes: Shapes) -> ModelShape:
    found = shapes(name)
    if found is None:
        raise ModelError(f"{key}: the size of {name} is not known here; give a model folder, or fetch its config.json")
    return found
