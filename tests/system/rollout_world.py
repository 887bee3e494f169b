"""A trainer with rollout engines connected to it, and what tests ask of them."""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_ray.config.sections import TrainingSection
from rlhf_ray.models.reading import TokenLogprobs
from rlhf_ray.packing import Sequence
from rlhf_ray.placement.groups import Placement, reserve
from rlhf_ray.placement.plan import Plan
from rlhf_ray.rollout.engine import EngineSpec, SampleRequest
from rlhf_ray.rollout.pool import RolloutPool, sampling_seed
from rlhf_ray.runtime.patience import Patience
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.scoring.scorer import response_sequence
from rlhf_ray.training.group import TrainerGroup
from rlhf_ray.training.objectives import LanguageModeling
from rlhf_ray.training.trainer import TrainerSpec
from rlhf_ray.trajectory import Trajectory

EOS = 4  # <|end|> of the tiny models
VOCAB = 320
MAX_MODEL_LEN = 256
TIMEOUT_S = 120.0
TOLERANCE = 1e-5  # of fp32 log-probabilities
PROBE = list(range(40, 72))
SMALL_BUCKET = 4096


class Named(Placement):
    """A placement whose actors are named after the test's world, so that two of them can live side by side."""

    def options(self, name: str, rank: int, part: int = 0) -> dict[str, Any]:
        options = super().options(name, rank, part)
        return options | {"name": f"{self.logs.name}-{options['name']}"}


@dataclass
class World:
    """A trainer and the engines connected to it. `refusal` is what an engine answered before the first transfer."""

    trainer: TrainerGroup
    pool: RolloutPool
    refusal: Exception | None
    version: int = 0

    def train(self, sequences: list[Sequence] | None = None, steps: int = 1) -> None:
        """Optimizer steps that change every weight."""
        for _ in range(steps):
            self.trainer.step(sequences or random_sequences(), LanguageModeling()).result()

    def transfer(self) -> dict[str, float]:
        self.version += 1
        return self.pool.update_weights(self.trainer, self.version, PROBE)

    def on_trainer(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(actor)` in each of the trainer's processes."""
        refs = [actor.__ray_call__.remote(function, *args) for actor in self.trainer._actors]
        return ray.get(refs, timeout=TIMEOUT_S)

    def model(self) -> Any:
        """A copy of the trainer's weights, in transformers."""

        def read(actor: Any) -> dict[str, Tensor]:
            return actor.trainer.full_state_dict()

        model = AutoModelForCausalLM.from_pretrained(self.trainer.spec.model)
        model.load_state_dict(self.on_trainer(read)[0], strict=not model.config.tie_word_embeddings)
        return model

    def sample(self, requests: list[SampleRequest]) -> list[Trajectory]:
        """All responses, in the order of the requests."""
        by_name = {(t.uid, t.sample): t for finished in self.pool.generate(requests) for t in finished}
        return [by_name[request.uid, request.sample] for request in requests]

    def sample_with_successor(self, requests: list[SampleRequest]) -> list[Trajectory]:
        """As `sample`, of the only engine, which dies meanwhile: its successor gets the weights as soon as it is up."""
        with ThreadPoolExecutor() as threads:
            sampled = threads.submit(self.sample, requests)
            while not wait([sampled], 0.2).done:
                if self.pool.wants_weights:
                    self.transfer()
            return sampled.result()

    def trainer_logprobs(self, trajectories: list[Trajectory], temperature: float = 1.0) -> list[Tensor]:
        return self.trainer.forward(list(map(response_sequence, trajectories)), TokenLogprobs(temperature)).result()


@contextmanager
def running(
    model: str,
    logs: Path,
    *,
    engines: int = 1,
    ranks: int = 1,
    tensor_parallel: int = 1,
    nodes: int = 1,
    prepare: Callable[[Any], None] | None = None,
    other_ways: tuple[int, ...] = (),
    dtype: str = "float32",
    **training: Any,
) -> Iterator[World]:
    """A world, not yet transferred.

    `prepare` runs in the trainer's processes before they connect; `other_ways` are the engines that receive and load as
    one on another host does, of a model that is not plain.
    """
    parts = engines * nodes
    plan = Plan(
        [{"CPU": 0.5}] * (parts + ranks),
        {"rollout": list(range(parts)), "policy": list(range(parts, parts + ranks))},
        split={"rollout": nodes},
    )
    engine = EngineSpec(
        model=model,
        dtype=dtype,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(EOS,),
        tensor_parallel=tensor_parallel,
        max_concurrency=32,
        options={"enforce_eager": True},
        gpu=False,
        gpu_memory_utilization=0.5,
        kv_cache_gib=0.05,
        trust_remote_code=False,
        backend="gloo",
        nodes=nodes,
    )
    spec = TrainerSpec("policy", model, "causal", TrainingSection(**training), 3e-3, total_steps=100, seed=0)
    with ExitStack() as stack:
        reserved = stack.enter_context(reserve(plan, logs))
        placement = Named(**vars(reserved))
        supervisor = stack.enter_context(Supervisor(logs.parent, Patience(TIMEOUT_S, TIMEOUT_S)))
        pool = RolloutPool(engine, placement, supervisor)
        pool.launch()
        trainer = TrainerGroup(spec, placement, "policy", supervisor)
        try:
            trainer.start().result()
            pool.start()
            world = World(trainer, pool, None)
            if prepare:
                world.on_trainer(prepare)
            ray.get([pool.engines[rank].__ray_call__.remote(take_other_ways) for rank in other_ways], timeout=TIMEOUT_S)
            pool.connect(trainer)
            world.refusal = refusal_of(pool)
            yield world
        finally:
            pool.stop()
            trainer.stop()


def use_small_buckets(actor: Any) -> None:
    """Buckets of 4 KiB in a trainer's process."""
    from rlhf_ray.rollout import gloo_transfer

    gloo_transfer.GlooTrainerInitInfo = functools.partial(gloo_transfer.GlooTrainerInitInfo, bucket_bytes=SMALL_BUCKET)


def take_other_ways(actor: Any) -> None:
    """Let an engine on a CPU look for the trainer's memory where it is not, and load as if it had special layers."""
    from rlhf_ray.rollout import gloo_transfer, loading

    worker = gloo_transfer.SharingWorker
    gloo_transfer.SharingWorker = lambda name, timeout_s: worker(f"not-{name}", timeout_s)
    loading.is_plain = lambda model: False


def ways_of(world: World) -> tuple[int, int]:
    """Workers that share the trainer's memory, and those that it reaches over gloo."""

    def count(actor: Any) -> tuple[int, int]:
        engine = actor._sender._engine
        if engine._shared is None:  # a rank that gathers alone
            return 0, 0
        return len(engine._shared._workers), engine._group.size() - 1 if engine._group else 0

    return world.on_trainer(count)[0]


def loads_plainly(engine: Any) -> bool:
    """What an engine that runs vLLM in its own process makes of its model."""

    def ask(actor: Any) -> bool:
        from rlhf_ray.rollout import loading

        return loading.is_plain(actor._engine._core.model_executor.driver_worker.worker.model_runner.model)

    return ray.get(engine.__ray_call__.remote(ask), timeout=TIMEOUT_S)


def refusal_of(pool: RolloutPool) -> Exception | None:
    try:
        list(pool.generate(requests_of(2)))
    except Exception as error:
        return error
    return None


def random_sequences(count: int = 8, seed: int = 0) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(24) > 0
    return [Sequence(torch.randint(5, VOCAB, (24,), generator=generator), mask) for _ in range(count)]


def requests_of(
    prompts: int, samples: int = 1, *, temperature: float = 1.0, max_new_tokens: int = 24, run_seed: int = 0
) -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(1)
    requests = []
    for index in range(prompts):
        ids = torch.randint(5, VOCAB, (4 + 3 * index,), generator=generator).tolist()
        requests += [
            SampleRequest(
                f"p{index}", sample, ids, sampling_seed(run_seed, 0, f"p{index}", sample), temperature, max_new_tokens
            )
            for sample in range(samples)
        ]
    return requests


def largest_difference(trajectories: list[Trajectory], logprobs: list[Tensor]) -> float:
    engine = torch.cat([torch.tensor(t.logprobs) for t in trajectories])
    return float((engine - torch.cat(logprobs)).abs().max())


def mean_difference(trajectories: list[Trajectory], logprobs: list[Tensor]) -> float:
    engine = torch.cat([torch.tensor(t.logprobs) for t in trajectories])
    return float((engine - torch.cat(logprobs)).abs().mean())


def assert_sampled_from_the_trainers_weights(world: World) -> None:
    """Several transfers of changing weights; after each the trainer agrees with the engines about their samples."""
    for _ in range(3):
        before = world.sample(requests_of(4, 2))
        world.train()
        metrics = world.transfer()
        assert metrics["rollout/probe_difference"] < TOLERANCE
        after = world.sample(requests_of(4, 2))
        assert {span.version for t in after for span in t.versions} == {world.version}
        assert largest_difference(after, world.trainer_logprobs(after)) < TOLERANCE
        # The new weights say something else, so equality is not that of weights that never arrived.
        assert largest_difference(before, world.trainer_logprobs(before)) > 1e-2
