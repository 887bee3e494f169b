"""The loop that SFT, reward model and DPO share: fixed examples, one trainer group, epochs in a seeded order."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config.offline import DPOConfig, RewardConfig, SFTConfig
from rlhf_ray.data import EpochOrder
from rlhf_ray.driver.health import UpdateHealth
from rlhf_ray.errors import ConfigError
from rlhf_ray.packing import Sequence
from rlhf_ray.placement.groups import reserve
from rlhf_ray.placement.plan import make_plan
from rlhf_ray.runtime.cluster import connection
from rlhf_ray.runtime.supervisor import supervisor_of
from rlhf_ray.stages.run import Run
from rlhf_ray.tracking.activity import Activity
from rlhf_ray.tracking.stall import reporting_stalls
from rlhf_ray.tracking.status import forget
from rlhf_ray.training.group import TrainerGroup
from rlhf_ray.training.trainer import Objective, TrainerSpec

logger = logging.getLogger(__name__)

OfflineConfig = SFTConfig | RewardConfig | DPOConfig


@dataclass
class Examples:
    """What is trained on.

    Attributes:
        sequences: all of them; example i is `sequences[i * size : (i + 1) * size]`.
        size: sequences of one example: 1, or 2 for a pair, which stays in one micro-batch.
    """

    sequences: list[Sequence]
    size: int

    def __len__(self) -> int:
        return len(self.sequences) // self.size

    def take(self, indices: list[int]) -> tuple[list[Sequence], list[int]]:
        """The sequences of these examples, and for each the example it belongs to."""
        chosen = [i * self.size + k for i in indices for k in range(self.size)]
        return [self.sequences[i] for i in chosen], [i // self.size for i in range(len(chosen))]

    def all(self) -> tuple[list[Sequence], list[int]]:
        """Everything, as `take`."""
        return self.take(list(range(len(self))))


@contextmanager
def trainer_group(config: OfflineConfig, run: Run, spec: TrainerSpec) -> Iterator[TrainerGroup]:
    """The stage's one group, up and running inside the block, with the weights that the stage starts from.

    Raises:
        ConfigError: the learning rate would never reach its peak.
    """
    if config.training.warmup_steps >= spec.total_steps:
        raise ConfigError(
            f"training.warmup_steps: {config.training.warmup_steps} is not below the {spec.total_steps} optimizer "
            "steps of the run (examples * epochs / batch_size, rounded up); lower it, or train for longer"
        )
    with connection(config.run.ray_address), reserve(make_plan(config), run.directory.logs) as placement:
        forget(run.directory.path)
        with (
            closing(Activity("driver", run.directory.path)),
            supervisor_of(config.run, run.directory.logs) as supervisor,
        ):
            trainer = TrainerGroup(spec, placement, "group", supervisor)
            try:
                with reporting_stalls(run.directory.path):
                    trainer.start().result()
                    yield trainer
            finally:
                trainer.stop()


def num_steps(examples: int, epochs: float, batch_size: int) -> int:
    """Optimizer steps of a stage; the last one takes what is left."""
    return math.ceil(examples * epochs / batch_size)


def fit(
    config: OfflineConfig,
    run: Run,
    trainer: TrainerGroup,
    examples: Examples,
    objective: Objective,
    epochs: int,
    batch_size: int,
    eval_every: int,
    evaluate: Callable[[], dict[str, float]],
    shown: list[str],
) -> dict[str, float]:
    """Train to the end, from the checkpoint if there is one, with a line of metrics an optimizer step.

    Returns:
        What `evaluate` said of the trained model.
    """
    final: dict[str, float] | None = None
    if run.checkpoint:
        trainer.load(str(run.checkpoint.folder / "trainer")).result()
    total_examples = len(examples) * epochs
    total_steps = num_steps(len(examples), epochs, batch_size)
    order = EpochOrder(len(examples), config.run.seed)
    if run.checkpoint and "order" in run.state:
        with run.checkpoint.restoring():
            order.load_state_dict(run.state["order"])
    health = UpdateHealth(run.directory.path, trainer.spec.name)
    with run.saving():
        for step in run.begin(total_steps, shown):
            started = time.monotonic()
            sequences, group = examples.take(order.next(min(batch_size, total_examples - step * batch_size)))
            metrics = trainer.step(sequences, objective, group).result()
            health.check(step, metrics, sequences, objective, group)
            seconds = time.monotonic() - started
            num_tokens = sum(len(sequence) for sequence in sequences)
            metrics |= {
                "num_tokens": num_tokens,
                "step_time": seconds,
                "tokens_per_second": num_tokens / seconds,
                "epoch": min(epochs, (step + 1) * batch_size / len(examples)),
            }
            last = step + 1 == total_steps
            if last or (eval_every and (step + 1) % eval_every == 0):
                final = evaluate()
                metrics |= final
            run.log(step, metrics)
            run.checkpoint_if_due(
                step, {"order": order.state_dict()}, lambda folder: [trainer.save(str(folder / "trainer"))]
            )
    # None where the last step was taken before a crash.
    return evaluate() if final is None else final


def prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    """The same metrics under `prefix`/."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def paths(path: str | list[str] | None) -> list[str]:
    """A path or several, as a list."""
    if path is None:
        return []
    return [path] if isinstance(path, str) else list(path)


def export_model(
    trainer: TrainerGroup,
    run: Run,
    tokenizer_folder: str,
    card: Any,
    extra_config: dict[str, Any] | None = None,
) -> Path:
    """Write the trained model into the run directory."""
    trainer.export(str(run.model_folder), tokenizer_folder, card, extra_config).result()
    return run.model_folder
