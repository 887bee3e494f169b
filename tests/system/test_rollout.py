"""Real vLLM engines fed by a real DeepSpeed trainer: what they refuse, and whether both speak of one distribution."""

import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray
import torch
from ppo_runs import processes_of
from rollout_world import (
    EOS,
    MAX_MODEL_LEN,
    TIMEOUT_S,
    TOLERANCE,
    VOCAB,
    World,
    assert_sampled_from_the_trainers_weights,
    largest_difference,
    loads_plainly,
    mean_difference,
    random_sequences,
    refusal_of,
    requests_of,
    running,
    use_small_buckets,
    ways_of,
)
from tiny_models import make_llama
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.errors import EngineError
from rlhf_ray.packing import Sequence
from rlhf_ray.rollout.engine import SampleRequest
from rlhf_ray.trajectory import Trajectory

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def tied(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two engines and one trainer rank, of a model whose embeddings are tied, sent in buckets of 4 KiB; the second
    engine receives and loads in other ways than the first."""
    folder = tmp_path_factory.mktemp("tied")
    with running(make_llama(folder / "model"), folder, engines=2, other_ways=(1,), prepare=use_small_buckets) as world:
        world.train()
        world.transfer()
        yield world


@pytest.fixture(scope="module")
def partitioned(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One engine of two tensor-parallel workers, split as over two nodes, and two ranks of ZeRO-3, of a model with
    untied embeddings, sent in buckets of 4 KiB."""
    folder = tmp_path_factory.mktemp("partitioned")
    model = make_llama(folder / "model", tie=False)
    with running(model, folder, ranks=2, tensor_parallel=2, nodes=2, prepare=use_small_buckets, zero_stage=3) as world:
        world.train()
        world.transfer()
        yield world


# ---- transfers


@pytest.mark.parametrize("name", ["tied", "partitioned"])
def test_a_new_engine_refuses_to_generate_before_a_committed_transfer(name: str, request: pytest.FixtureRequest):
    refusal = request.getfixturevalue(name).refusal
    assert isinstance(refusal, EngineError)
    assert "no complete weight transfer" in str(refusal)


def test_logprobs_equal_the_trainers_after_every_transfer_with_tied_embeddings(tied: World):
    assert ways_of(tied) == (1, 1)
    assert list(map(loads_plainly, tied.pool.engines)) == [True, False]
    assert_sampled_from_the_trainers_weights(tied)


def test_logprobs_equal_the_trainers_with_zero_3_untied_embeddings_and_many_buckets(partitioned: World):
    assert ways_of(partitioned) == (2, 0)
    assert_sampled_from_the_trainers_weights(partitioned)

    def buckets_of(actor: Any) -> int:
        from rlhf_ray.rollout.buckets import TensorSpec, plan_buckets

        engine = actor._sender._engine
        specs = [TensorSpec(m.name, m.dtype, m.shape) for m in engine.source.metadata()]
        return len(plan_buckets(specs, engine._bucket_bytes))

    assert partitioned.on_trainer(buckets_of)[0] > 10


def test_an_engine_in_bf16_serves_weights_and_biases_of_an_fp32_trainer(ray_cluster: None, tmp_path: Path):
    path = make_llama(tmp_path / "model", tie=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(path, attention_bias=True, mlp_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    with running(path, tmp_path, dtype="bfloat16") as world:
        assert loads_plainly(world.pool.engines[0])
        for steps in (1, 8):
            world.train(steps=steps)
            world.transfer()
            trajectories = world.sample(requests_of(4, 2))
            assert mean_difference(trajectories, world.trainer_logprobs(trajectories)) < 0.05
        world.train(steps=8)
        assert mean_difference(trajectories, world.trainer_logprobs(trajectories)) > 0.2


def test_a_corrupted_transfer_raises_and_the_engines_serve_nothing_until_a_good_one(tied: World):
    def corrupt(actor: Any) -> None:
        trainer = actor.trainer

        def parameters(dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
            for name, data in type(trainer).parameters_in_full(trainer, dtype):
                yield name, data * 1.05 if name.endswith("layers.1.mlp.down_proj.weight") else data

        trainer.parameters_in_full = parameters

    def mend(actor: Any) -> None:
        del actor.trainer.parameters_in_full

    tied.on_trainer(corrupt)
    try:
        with pytest.raises(EngineError, match=r"rollout-0.*differ from the trainer's.*must not serve"):
            tied.transfer()
    finally:
        tied.on_trainer(mend)
    assert isinstance(refusal_of(tied.pool), EngineError)
    tied.transfer()
    trajectories = tied.sample(requests_of(2))
    assert largest_difference(trajectories, tied.trainer_logprobs(trajectories)) < TOLERANCE


def test_a_transfer_that_breaks_off_leaves_engines_that_serve_nothing_until_a_whole_one(tied: World):
    def break_off(actor: Any) -> None:
        trainer = actor.trainer

        def parameters(dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
            # Ends within a layer, of which the engines hold a part then.
            for name, data in type(trainer).parameters_in_full(trainer, dtype):
                if name.endswith("layers.1.self_attn.v_proj.weight"):
                    raise RuntimeError("the source broke")
                yield name, data

        trainer.parameters_in_full = parameters

    def mend(actor: Any) -> None:
        del actor.trainer.parameters_in_full

    tied.on_trainer(break_off)
    try:
        with pytest.raises(EngineError, match="the source broke"):
            tied.transfer()
    finally:
        tied.on_trainer(mend)
    assert isinstance(refusal_of(tied.pool), EngineError)
    tied.train()
    tied.transfer()
    assert ways_of(tied) == (1, 1)
    trajectories = tied.sample(requests_of(4))
    assert largest_difference(trajectories, tied.trainer_logprobs(trajectories)) < TOLERANCE


def test_an_update_that_was_opened_and_never_filled_does_not_keep_out_the_next_one(tied: World):
    """As it is left where another engine dies before the weights are sent."""
    ray.get(tied.pool.engines[0].start_weight_update.remote(), timeout=TIMEOUT_S)
    with pytest.raises(EngineError, match="weight transfer"):
        tied.transfer()
    tied.transfer()
    trajectories = tied.sample(requests_of(2))
    assert largest_difference(trajectories, tied.trainer_logprobs(trajectories)) < TOLERANCE


def test_weights_that_are_not_finite_never_serve(tied: World):
    """NaN compares false with every tolerance; the probe must not let it through."""

    def break_weights(actor: Any) -> Tensor:
        weight = next(p for n, p in actor.trainer.model.transformers_parameters() if n.endswith("norm.weight"))
        before = weight.detach().clone()
        weight.data[0] = float("nan")
        return before

    def restore(actor: Any, before: Tensor) -> None:
        weight = next(p for n, p in actor.trainer.model.transformers_parameters() if n.endswith("norm.weight"))
        weight.data.copy_(before)

    (before,) = tied.on_trainer(break_weights)
    try:
        with pytest.raises(EngineError):
            tied.transfer()
    finally:
        tied.on_trainer(restore, before)
    assert isinstance(refusal_of(tied.pool), EngineError)
    tied.transfer()


@pytest.mark.parametrize("name", ["tied", "partitioned"])
def test_requests_in_flight_during_a_transfer_carry_the_version_of_each_token(
    name: str, request: pytest.FixtureRequest
):
    world: World = request.getfixturevalue(name)
    requests = requests_of(24, max_new_tokens=180)
    world.transfer()
    old_version, old_model = world.version, world.model()
    world.train(steps=2)
    trajectories: list[Trajectory] = []

    def collect() -> None:
        trajectories.extend(t for finished in world.pool.generate(requests) for t in finished)

    sampling = Thread(target=collect)
    sampling.start()
    time.sleep(0.3)
    world.transfer()
    sampling.join(TIMEOUT_S)
    assert len(trajectories) == len(requests)
    for trajectory in trajectories:
        bounds = [(span.start, span.end) for span in trajectory.versions]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == len(trajectory.response_ids)
        assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
    mixed = [t for t in trajectories if len(t.versions) == 2]
    assert mixed, "no request was in flight"
    for trajectory, new_logprobs in zip(mixed, world.trainer_logprobs(mixed), strict=True):
        first, second = trajectory.versions
        assert (first.version, second.version) == (old_version, world.version)
        engine_logprobs = torch.tensor(trajectory.logprobs)
        old_logprobs = logprobs_under(old_model, trajectory)
        # Each token carries the log-probability, and the version, of the weights that it was sampled with.
        torch.testing.assert_close(engine_logprobs[: first.end], old_logprobs[: first.end], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(engine_logprobs[first.end :], new_logprobs[first.end :], rtol=0, atol=TOLERANCE)
        assert float((old_logprobs - new_logprobs).abs().mean()) > 1e-2


def logprobs_under(model: Any, trajectory: Trajectory) -> Tensor:
    ids = torch.from_numpy(trajectory.token_ids)
    start = len(trajectory.prompt_ids)
    with torch.no_grad():
        logprobs = model(ids[None]).logits[0].log_softmax(-1)
    return logprobs[start - 1 : -1].gather(1, ids[start:, None])[:, 0]


@pytest.mark.parametrize("name", ["tied", "partitioned"])
def test_prompts_cached_under_old_weights_are_not_read_under_new_ones(name: str, request: pytest.FixtureRequest):
    """A prompt of several cache blocks, sampled before and after a transfer."""
    world: World = request.getfixturevalue(name)
    ids = torch.randint(5, VOCAB, (200,), generator=torch.Generator().manual_seed(2)).tolist()
    request = [SampleRequest("long", 0, ids, 1, 1.0, 8)]
    world.sample(request)
    world.train()
    world.transfer()
    for _ in range(2):  # the second time the prompt comes from the cache
        (trajectory,) = world.sample(request)
        assert largest_difference([trajectory], world.trainer_logprobs([trajectory])) < TOLERANCE


# ---- sampling


def test_the_same_seeds_give_the_same_tokens_in_any_batching(tied: World):
    requests = requests_of(4, 4)
    first, again = tied.sample(requests), tied.sample(requests)
    alone = [tied.sample([request])[0] for request in requests[:6]]
    for one, two in [*zip(first, again, strict=True), *zip(first, alone, strict=False)]:
        assert one.response_ids.tolist() == two.response_ids.tolist()
        assert torch.tensor(one.logprobs).sub(torch.tensor(two.logprobs)).abs().max() < TOLERANCE
    assert len({tuple(t.response_ids) for t in first}) == len(first)  # samples of one prompt differ
    others = tied.sample(requests_of(4, 4, run_seed=1))
    assert all(one.response_ids.tolist() != two.response_ids.tolist() for one, two in zip(first, others, strict=True))


def test_logprobs_are_those_of_the_sampling_temperature(tied: World):
    trajectories = tied.sample(requests_of(4, 2, temperature=0.7))
    assert largest_difference(trajectories, tied.trainer_logprobs(trajectories, 0.7)) < TOLERANCE
    assert largest_difference(trajectories, tied.trainer_logprobs(trajectories, 1.0)) > 1e-2


def test_requests_are_split_over_the_engines_and_those_of_one_prompt_stay_together(tied: World):
    def count(actor: Any) -> None:
        sample = type(actor)._sample
        actor.sampled = []

        async def counting(request: SampleRequest) -> Trajectory:
            actor.sampled.append(request.uid)
            return await sample(actor, request)

        actor._sample = counting

    def stop_counting(actor: Any) -> list[str]:
        del actor._sample
        return actor.sampled

    def on_engines(function: Callable[[Any], Any]) -> list[Any]:
        return ray.get([engine.__ray_call__.remote(function) for engine in tied.pool.engines], timeout=TIMEOUT_S)

    on_engines(count)
    tied.sample(requests_of(4, 3, max_new_tokens=4))
    assert list(map(Counter, on_engines(stop_counting))) == [{"p0": 3, "p2": 3}, {"p1": 3, "p3": 3}]


def test_a_prompt_that_leaves_less_room_than_was_asked_for_ends_at_the_context(tied: World):
    ids = torch.randint(5, VOCAB, (MAX_MODEL_LEN - 5,), generator=torch.Generator().manual_seed(3)).tolist()
    (trajectory,) = tied.sample([SampleRequest("long", 0, ids, 1, 1.0, 24)])
    assert trajectory.prompt_ids.tolist() == ids
    assert 1 <= len(trajectory.response_ids) <= 5
    assert trajectory.truncated == (trajectory.response_ids[-1] != EOS)


def test_a_response_ends_with_the_end_of_sequence_or_at_its_limit(tied: World):
    """The model learns to end, so that both happen."""
    sequences = []
    for one in random_sequences(16):
        ids = one.input_ids.clone()
        ids[6::6] = EOS
        sequences.append(Sequence(ids, one.loss_mask))
    tied.train(sequences, steps=6)
    tied.transfer()
    trajectories = tied.sample(requests_of(6, 8, max_new_tokens=6))
    for trajectory in trajectories:
        assert EOS not in trajectory.response_ids[:-1]
        ended = trajectory.response_ids[-1] == EOS
        assert trajectory.finish_reason == ("stop" if ended else "length")
        assert ended or len(trajectory.response_ids) == 6
        assert len(trajectory.logprobs) == len(trajectory.response_ids)
    assert len({t.finish_reason for t in trajectories}) == 2
    # The end-of-sequence token has a log-probability of its own, and the trainer agrees on it.
    assert largest_difference(trajectories, tied.trainer_logprobs(trajectories)) < TOLERANCE


def test_what_an_engine_that_leaves_has_not_answered_the_others_answer(tied: World):
    """The last tests of these engines; from here on there is one."""
    requests = requests_of(24, max_new_tokens=180)
    expected = tied.sample(requests)
    answered: list[Trajectory] = []
    for finished in tied.pool.generate(requests):
        if not answered:
            tied.pool.resize(1)
        answered += finished
    assert len(tied.pool.engines) == 1
    by_name = {(t.uid, t.sample): t.response_ids.tolist() for t in answered}
    assert len(answered) == len(by_name)
    assert [by_name[t.uid, t.sample] for t in expected] == [t.response_ids.tolist() for t in expected]


def test_an_engine_ends_when_a_step_of_vllm_fails_and_its_successor_answers(tied: World):
    def break_step(actor: Any) -> None:
        def fail() -> None:
            raise MemoryError("no room for the step")

        actor._engine._engine.step = fail

    (engine,) = tied.pool.engines
    ray.get(engine.__ray_call__.remote(break_step))
    trajectories = tied.sample_with_successor(requests_of(2, max_new_tokens=5))
    assert largest_difference(trajectories, tied.trainer_logprobs(trajectories)) < TOLERANCE
    assert tied.pool.engines != [engine]


def test_an_engine_ends_with_all_its_processes_when_the_workers_of_its_other_node_do(partitioned: World):
    logs = str(partitioned.pool._placement.logs)
    trainers = {os.getpid(), *partitioned.on_trainer(lambda _: os.getpid())}
    of_engine = processes_of(logs).keys() - trainers
    assert len(of_engine) >= 5  # two actors, vLLM's engine and two workers
    ray.kill(ray.get_actor(f"{Path(logs).name}-rollout-0-part-1"))
    trajectories = partitioned.sample_with_successor(requests_of(24, max_new_tokens=180))
    assert largest_difference(trajectories, partitioned.trainer_logprobs(trajectories)) < TOLERANCE
    deadline = time.monotonic() + 30
    while of_engine & processes_of(logs).keys():
        assert time.monotonic() < deadline, processes_of(logs)
        time.sleep(0.2)


def test_its_successor_serves_and_ends_when_vllms_own_process_does(partitioned: World):
    """vLLM's workers of tensor-parallel engines are in processes of their own, with one between."""
    assert_sampled_from_the_trainers_weights(partitioned)
    logs = str(partitioned.pool._placement.logs)
    (own,) = [pid for pid, name in processes_of(logs).items() if "EngineCore" in name]
    os.kill(own, signal.SIGKILL)
    time.sleep(1)  # nobody asks anything of it meanwhile
    partitioned.transfer()  # to the successor, once it is up
    assert_sampled_from_the_trainers_weights(partitioned)
