"""Metrics on Weights & Biases.

The API key comes from the environment (`WANDB_API_KEY`) alone, as do the project (`WANDB_PROJECT`) and the team
(`WANDB_ENTITY`). A run goes on without W&B: when the service does not answer at the start, the run is recorded offline
(`wandb sync` uploads it later); when a call to W&B fails, that is logged once and nothing more is sent.
`metrics.jsonl` holds everything in either case.
"""

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb

from rlhf_ray.config.sections import TrackingSection
from rlhf_ray.errors import ConfigError

logger = logging.getLogger(__name__)

# How long to wait for the service's first answer.
ANSWER_TIMEOUT_S = 10.0


class WandbSink:
    """One W&B run, the same one across resumes because it is opened by its id.

    Args:
        directory: where W&B keeps its files, in a folder `wandb`.
        section: its mode, which is "offline" or "online".
        config: shown as the run's configuration.
        name: the run's display name.
        job_type: the stage.
        run_id: the run's id.

    Raises:
        ConfigError: mode online without an API key in the environment.
    """

    def __init__(
        self,
        directory: Path,
        section: TrackingSection,
        config: dict[str, Any],
        name: str,
        job_type: str,
        run_id: str,
    ):
        if section.wandb == "online" and not os.environ.get("WANDB_API_KEY"):
            raise ConfigError(
                "`tracking.wandb` is online and the environment variable WANDB_API_KEY is not set; "
                "set it, or set `tracking.wandb` to offline or off"
            )
        self._run: wandb.Run | None = None
        try:
            online = section.wandb == "online" and _answers(wandb.setup().settings.base_url)
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "rlhf_ray",
                name=name,
                job_type=job_type,
                config=config,
                dir=directory,
                id=run_id,
                resume="allow",
                mode="online" if online else "offline",
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # W&B raises its own errors, OSError, ValueError and more.
            _report(error)
        # Not W&B's own step: it refuses steps below its last one, and a resumed run repeats some of those.
        self._attempt(lambda run: run.define_metric("*", step_metric="step"))

    def log(self, step: int, metrics: dict[str, float | int]) -> None:
        """Sends the metrics of one step."""
        self._attempt(lambda run: run.log({"step": step, **metrics}))

    def log_table(self, step: int, columns: dict[str, list[Any]]) -> None:
        """Sends a sample table; each step has a table of its own, since a logged table is immutable."""

        def log(run: wandb.Run) -> None:
            rows = [list(row) for row in zip(*columns.values(), strict=True)]
            run.log({"step": step, "samples": wandb.Table(columns=list(columns), data=rows)})

        self._attempt(log)

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        """Ends the run; an exit code other than 0 marks it as failed."""

        def finish(run: wandb.Run) -> None:
            run.summary.update(summary)
            run.finish(exit_code=exit_code)

        self._attempt(finish)
        self._run = None

    def _attempt(self, call: Callable[[wandb.Run], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            self._run = None
            _report(error)


def _report(error: Exception) -> None:
    logger.warning("W&B failed (%s: %s); nothing more is sent to it", type(error).__name__, error)


def _answers(url: str) -> bool:
    # W&B's own attempt would hold the run's id after it failed, so that the run could not be opened offline.
    try:
        urllib.request.urlopen(url, timeout=ANSWER_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True  # An answer, if not the best one.
    except OSError as error:
        logger.warning("W&B does not answer at %s (%s); recording offline, upload with `wandb sync`", url, error)
        return False
    return True
