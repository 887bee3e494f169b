"""Real Ray, tiny models and trainer groups of one, two and four ranks."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_ray.config.sections import TrainingSection
from rlhf_ray.training.trainer import TrainerSpec

# The tiny models are the unit tests' own.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from tiny_models import make_llama
from trainer_ranks import Ranks

CPUS = 8


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster with more logical CPUs than the machine may have, so that groups of four ranks fit.

    At the address of its node: this process may make clusters of several nodes later, which would be at 127.0.0.1, too.
    """
    ray.init(
        "local",
        num_cpus=CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=256 * 2**20,
        _system_config={"prestart_worker_first_driver": False},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model folders by what a trainer makes of them: `causal`, `scalar`, and `wide`, another architecture."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "causal": make_llama(folder / "causal"),
        "scalar": make_llama(folder / "scalar", scalar=True),
        "wide": make_llama(folder / "wide", hidden=128),
    }


@pytest.fixture(scope="session")
def make_spec(models: dict[str, str]) -> Callable[..., TrainerSpec]:
    """What a trainer is made of; the options are those of the training section, and some of the specification's."""

    def spec(
        head: str = "causal",
        *,
        model: str | None = None,
        learning_rate: float = 1e-2,
        total_steps: int = 10,
        dropout: float = 0.0,
        eps: float = 1e-8,
        **section: Any,
    ) -> TrainerSpec:
        return TrainerSpec(
            name="test",
            model=models[model or head],
            head=head,
            section=TrainingSection(**section),
            learning_rate=learning_rate,
            total_steps=total_steps,
            seed=0,
            dropout=dropout,
            eps=eps,
        )

    return spec


@pytest.fixture(scope="session")
def ranks(
    ray_cluster: None, make_spec: Callable[..., TrainerSpec], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[int], Ranks]]:
    """Trainer groups by number of ranks, started when first asked for."""
    started: dict[int, Ranks] = {}
    with ExitStack() as stack:

        def get(world_size: int) -> Ranks:
            if world_size not in started:
                started[world_size] = Ranks(make_spec(), world_size, tmp_path_factory.mktemp("logs"), stack)
            return started[world_size]

        yield get
