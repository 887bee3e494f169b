"""What a measurement of some of a configuration's groups begins with: a folder for logs, and bundles."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.placement.groups import Placement, reserve
from rlhf_ray.placement.plan import GroupDemand, plan_of
from rlhf_ray.runtime.cluster import connection


@contextmanager
def reserved(config: PPOConfig, demands: Sequence[GroupDemand]) -> Iterator[Placement]:
    """Bundles of these groups on the configuration's cluster, until the end of the block.

    Their processes log into a folder beside `run.dir`, `<run.dir>-bench`, which all nodes must see.

    Raises:
        ResourceError: there is no such cluster, or it is too small.
    """
    logs = Path(config.run.dir + "-bench").absolute()
    logs.mkdir(parents=True, exist_ok=True)
    plan = plan_of(list(demands), config.placement.of(tuple(demand.name for demand in demands)))
    with connection(config.run.ray_address), reserve(plan, logs) as placement:
        yield placement
