"""A run whose trainer, node or whole cluster fails starts again by itself, as the same command would."""

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from rlhf_ray.errors import ActorDied, ResourceError, Stalled
from rlhf_ray.runtime.budget import RestartBudget
from rlhf_ray.tracking.rundir import metric_rows

logger = logging.getLogger(__name__)

P = ParamSpec("P")


def starts_again(train: Callable[P, Path]) -> Callable[P, Path]:
    """A stage that continues from its newest checkpoint when a process that it cannot do without died or hung.

    Steps after that checkpoint are taken again. What is wrong with the configuration, the data or the numbers is raised
    at once; so is a cluster that is too small, unless the run has worked on it before.

    Args:
        train: the stage, of its configuration.
    """

    @functools.wraps(train)
    def persistent(*args: P.args, **kwargs: P.kwargs) -> Path:
        config: Any = args[0]
        budget, furthest, failed = RestartBudget(), 0, False
        while True:
            try:
                return train(*args, **kwargs)
            except (ActorDied, Stalled, ResourceError) as error:
                if isinstance(error, ResourceError) and not failed:
                    raise
                steps = len(list(metric_rows(Path(config.run.dir) / "metrics.jsonl")))
                if steps > furthest:
                    budget.renew()
                furthest, failed = max(furthest, steps), True
                pause = budget.spend("the run", error)
                logger.warning("%s\nAfter %d steps the run starts again from its newest checkpoint", error, steps)
                time.sleep(pause)

    return persistent
