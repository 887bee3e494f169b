"""The bare work of an iteration of PPO: vLLM alone and plain torch, each in a process of its own on all cores."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.bench.bare import BareEngine
from rlhf_ray.bench.bare_torch import BareTorch
from rlhf_ray.bench.workload import Workload
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.driver.groups import engine_spec
from rlhf_ray.runtime.cluster import actor_environment
from rlhf_ray.runtime.remote import START_TIMEOUT_S, get
from rlhf_ray.tracking.logs import logging_environment

STEPS = {
    "reference forward": ("forward", "causal"),
    "reward forward": ("forward", "scalar"),
    "critic forward": ("forward", "scalar"),
    "policy step": ("step", "causal"),
    "critic step": ("step", "scalar"),
}


@dataclass
class BareWork:
    """What is measured, and its seconds so far.

    Attributes:
        parts: each of them does its share of the work once, and says how many seconds that took.
    """

    parts: dict[str, Callable[[], Any]]
    timeout_s: float
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def measure(self) -> None:
        """Do all of it once, one part after the other."""
        for name, part in self.parts.items():
            self.seconds.setdefault(name, []).append(get(part(), f"the bare work: {name}", self.timeout_s))


@contextmanager
def bare_work(config: PPOConfig, requests: Workload, prompt_tokens: int) -> Iterator[BareWork]:
    """The bare work of an iteration of `config`, with the same models, limits, micro-batches and memory settings.

    Args:
        config: the run. Ray must be connected.
        requests: what is sampled.
        prompt_tokens: of each prompt.
    """
    cores = len(os.sched_getaffinity(0))
    logs = Path(config.run.dir + "-bare")
    logs.mkdir(parents=True, exist_ok=True)
    actors: list[Any] = []

    def start(actor: type, name: str, gpus: float, *args: Any) -> Any:
        variables = {**actor_environment(cores, gpus), **logging_environment(logs, name)}
        actor_class: Any = ray.remote(actor)
        options = {"num_cpus": 0, "num_gpus": gpus, "runtime_env": {"env_vars": variables}}
        actors.append(actor_class.options(**options).remote(*args))
        get(actors[-1].ready.remote(), f"{name}: start-up", START_TIMEOUT_S)
        return actors[-1]

    try:
        rollout, training, gpus = config.rollout, config.training, config.policy.gpus
        spec = engine_spec(config, eos_token_ids=())
        engine = start(BareEngine, "bare-vllm", rollout.gpus * rollout.tensor_parallel, spec)
        models = (config.policy.path, config.critic.init)
        numbers = (training.dtype, cores, training.micro_batch_tokens, gpus > 0)
        torch_alone = start(BareTorch, "bare-torch", gpus, *models, *numbers)
        sequences = [prompt + [0] * length for prompt, length in zip(requests.prompts, requests.lengths, strict=True)]
        parts: dict[str, Callable[[], Any]] = {"generate": partial(engine.run.remote, requests)}
        for name, (method, head) in STEPS.items():
            parts[name] = partial(getattr(torch_alone, method).remote, head, sequences, prompt_tokens)
        yield BareWork(parts, config.run.timeout_s)
    finally:
        for actor in actors:
            ray.kill(actor)
