"""`rlhf-ray bench transfer`: how long new weights take to reach the engines, beside one copy of the same bytes."""

import time
from contextlib import ExitStack
from typing import Any

import ray
import torch

from rlhf_ray.bench.reserved import reserved
from rlhf_ray.bench.rollout import spread
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.driver.groups import engine_spec, trainer_group
from rlhf_ray.driver.turns import Turns
from rlhf_ray.errors import ModelError
from rlhf_ray.placement.memory import BYTES
from rlhf_ray.placement.plan import demands
from rlhf_ray.placement.shapes import find_shape
from rlhf_ray.rollout.options import check_options
from rlhf_ray.rollout.pool import PROBE_TOKENS, RolloutPool
from rlhf_ray.runtime.cluster import actor_environment
from rlhf_ray.runtime.remote import get
from rlhf_ray.runtime.supervisor import supervisor_of

GROUPS = ("policy", "rollout")
PROBE = list(range(10, 10 + PROBE_TOKENS))


class Copier:
    """A Ray actor that copies bytes within memory, or within that of the first GPU of its node."""

    def __init__(self, gpu: bool) -> None:
        self._device = "cuda" if gpu else "cpu"

    def copy(self, size: int) -> float:
        """Seconds to copy `size` bytes between two buffers that were written before."""
        source = torch.ones(size, dtype=torch.uint8, device=self._device)
        target = torch.zeros(size, dtype=torch.uint8, device=self._device)
        started = self._now()
        target.copy_(source)
        return self._now() - started

    def _now(self) -> float:
        """The clock, once a GPU has done what it was given."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def bench_transfer(config: PPOConfig, repeats: int) -> dict[str, Any]:
    """Send the policy's weights to idle engines, and copy as many bytes within one process, in turns.

    A transfer is all that lies between the last response on old weights and the first on new ones: engines stop,
    receive and load, the probe agrees, they serve. Engines that share GPUs with the policy sleep before, as in a run.

    Args:
        config: its policy and rollout engines are started; they log into `<run.dir>-bench`.
        repeats: transfers that are measured, after one that connects and warms up.

    Returns:
        Parameters, bytes on the wire, seconds of a transfer and of a copy, and their ratio, with median and spread.

    Raises:
        RlhfError: vLLM has no such option, the cluster is too small, or a process failed.
    """
    check_options(config.rollout.vllm, gpu=config.rollout.gpus > 0)
    transfers, copies = [], []
    with ExitStack() as stack:
        wanted = [demand for demand in demands(config) if demand.name in GROUPS]
        placement = stack.enter_context(reserved(config, wanted))
        # Beside the GPUs of the policy and the engines, which are reserved whole: Ray hides none from it.
        environment = {"env_vars": actor_environment(config.policy.cpus, config.policy.gpus)}
        actor_class: Any = ray.remote(Copier)
        copier = actor_class.options(num_cpus=0, runtime_env=environment).remote(config.policy.gpus > 0)
        supervisor = stack.enter_context(supervisor_of(config.run, placement.logs))
        pool = RolloutPool(engine_spec(config, ()), placement, supervisor)
        policy = trainer_group(config, placement, "policy", supervisor)
        turns = Turns(config, {"policy": policy}, pool)
        try:
            if not turns.taken:
                pool.launch()
            policy.start().result()
            if turns.taken:
                turns.to_engines()
                pool.launch()
            pool.start()
            shape = find_shape(config.policy.path)  # a model of the hub is on this machine by now
            if shape is None:
                raise ModelError(f"policy.path: {config.policy.path} has no config.json that tells its size")
            size = shape.parameters * BYTES[config.rollout.dtype]
            for version in range(repeats + 1):
                turns.to_trainers()
                turns.to_engines()
                transfers.append(pool.update_weights(policy, version, PROBE)["time/transfer"])
                copies.append(get(copier.copy.remote(size), "a copy in memory", config.run.timeout_s))
        finally:
            policy.stop()
            pool.stop()
            ray.kill(copier)
    copy_s = spread(copies[1:])
    return {
        "engines": config.rollout.engines,
        "parameters": shape.parameters,
        "bytes": size,
        "warm_up_s": transfers[0],
        "transfer_s": spread(transfers[1:]),
        "copy_s": copy_s,
        "transfer_per_copy": spread([one / copy_s["median"] for one in transfers[1:]]),
    }
