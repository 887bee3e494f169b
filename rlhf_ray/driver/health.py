"""Whether the numbers of a run are sound: updates that were skipped, weights that stand still, engines that differ.

A trainer skips an update whose loss or gradient is not finite (`training/trainer.py`); one is bad luck, several in a
row are a run that goes nowhere.
"""

import logging
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlhf_ray.errors import BudgetExhausted, shortened
from rlhf_ray.packing import Sequence
from rlhf_ray.training.replay import save_batch

logger = logging.getLogger(__name__)

# So many updates in a row that were skipped end the run.
MOST_SKIPPED = 3
# After so many updates in a row that left every parameter as it was, something is wrong.
MOST_UNCHANGED = 10
# Mean absolute difference of the log-probabilities of engine and trainer with the same weights, in nats; that of the
# probe after a transfer. Two implementations in fp32 differ by 1e-6, in bf16 by a few times the 4e-3 of its rounding.
MISMATCH = {"fp32": 1e-3, "bf16": 5e-2}
BAD_BATCHES = "bad_batches"


class UpdateHealth:
    """Watches the updates of one trainer.

    Args:
        run_dir: receives the batch that ends the run.
        trainer: its name.
    """

    def __init__(self, run_dir: Path, trainer: str) -> None:
        self._run_dir = run_dir
        self._trainer = trainer
        self._skipped = 0

    def check(
        self, step: int, metrics: dict[str, float], batch: Items[Sequence], objective: Any, group: Items[int] | None
    ) -> None:
        """After an update: warn where the weights stand still, and end the run where too many were skipped.

        Args:
            step: of the run (PPO: iteration).
            metrics: those of the trainer.
            batch: what was trained on, with `objective` and `group` as the trainer got them.

        Raises:
            BudgetExhausted: too many updates in a row were skipped; the last one's batch is saved.
        """
        if metrics["unchanged_updates"] == MOST_UNCHANGED:
            logger.warning(
                "%s: %d updates in a row have left every parameter as it was; is the learning rate too small for the "
                "precision, or the gradient zero (grad_norm)?",
                self._trainer,
                MOST_UNCHANGED,
            )
        if not metrics["skipped_updates"]:
            self._skipped = 0
            return
        self._skipped += 1
        logger.warning(
            "%s: the update was skipped, because its loss (%s) or gradient (norm %s) is not finite; weights and "
            "optimizer are as they were",
            self._trainer,
            metrics["loss"],
            metrics["grad_norm"],
        )
        if self._skipped < MOST_SKIPPED:
            return
        folder = self._run_dir / BAD_BATCHES / f"{self._trainer}_{step:06d}"
        try:
            counts = save_batch(folder, batch, group, objective, metrics)
        except (OSError, SafetensorError) as error:  # a full disk, say; why the run ends counts more
            saved = f"The last batch could not be saved in {folder}: {shortened(error)}"
        else:
            broken = ", ".join(f"{name} ({count})" for name, count in counts.items())
            saved = f"The last batch is saved in {folder}, to be read by rlhf_ray.training.replay.load_batch"
            saved += f"; not finite in it: {broken}" if broken else ""
        raise BudgetExhausted(
            f"{self._trainer} trainer: {MOST_SKIPPED} updates in a row were skipped, because loss or gradient was not "
            f"finite (the last loss {metrics['loss']}, gradient norm {metrics['grad_norm']}); the weights are those of "
            f"the last update that was taken. {saved}. Lower the learning rate or max_grad_norm, or look for broken "
            "data; the same command continues from the newest checkpoint"
        )


def mismatch_alarm(metrics: dict[str, float], dtypes: set[str]) -> dict[str, float]:
    """Whether engine and trainer differ by more than rounding explains, as a metric, with a warning if so.

    Args:
        metrics: those of `algorithms.mismatch`.
        dtypes: precisions of engine and trainer.
    """
    difference = metrics["sampling/sampling_logp_difference/mean"]
    bound = max(MISMATCH[dtype] for dtype in dtypes)
    alarm = not difference <= bound  # NaN is one
    if alarm:
        logger.warning(
            "the log-probabilities of engine and trainer differ by %.3g nats a token, where up to %g is rounding; "
            "responses are not sampled from the policy that is trained",
            difference,
            bound,
        )
    return {"sampling/sampling_logp_difference/alarm": float(alarm)}
