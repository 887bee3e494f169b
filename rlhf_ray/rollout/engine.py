"""One rollout engine: vLLM's asynchronous engine inside a Ray actor.

An engine starts STALE: it has no weight version and refuses to generate until a complete transfer was committed,
which the pool does only after the probe agreed with the trainer.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_ray.errors import EngineError
from rlhf_ray.rollout.further_nodes import FurtherNodes
from rlhf_ray.rollout.in_process import InProcessEngine
from rlhf_ray.runtime.chaos import reached
from rlhf_ray.runtime.cores import bind_to_cores
from rlhf_ray.runtime.interface import choose_interface
from rlhf_ray.tracking.activity import activity
from rlhf_ray.tracking.logs import setup_actor_logging
from rlhf_ray.trajectory import Trajectory, VersionSpan

logger = logging.getLogger(__name__)

# A response waits for others at most this share of the time since its call began: what is handed over together costs
# the driver as much as one. The last one waits for none.
GATHER_SHARE = 0.15

# Tokens of one scheduler step on a CPU: prompts of many requests start together.
CPU_STEP_TOKENS = 4096


@dataclass(frozen=True)
class EngineSpec:
    """What an engine needs to start.

    Attributes:
        model: transformers folder or hub name; its weights come with the first transfer.
        dtype: "float32" or "bfloat16".
        max_model_len: prompt and response tokens together.
        eos_token_ids: tokens that end a response; without any it ends at its limit alone.
        backend: weight-transfer backend: "gloo", "nccl", or "ipc" where each engine shares its GPU with a trainer rank.
        nodes: over how many nodes each engine is split.
        sleeps: whether it is to give its GPU's memory to others at times.
        statistics: whether to keep `EngineStatistics`.
        options: further arguments of vLLM, checked by `rollout.options`.
    """

    model: str
    dtype: str
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    tensor_parallel: int
    max_concurrency: int
    gpu: bool
    gpu_memory_utilization: float
    kv_cache_gib: float | None
    trust_remote_code: bool
    backend: str
    nodes: int = 1
    sleeps: bool = False
    statistics: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleRequest:
    """One response to sample: who asks, the prompt's tokens and the seed that makes the sample repeatable."""

    uid: str
    sample: int
    prompt_ids: list[int]
    seed: int
    temperature: float
    max_new_tokens: int


class RolloutEngine:
    """The actor. Ray runs its coroutines side by side on one event loop."""

    def __init__(self, spec: EngineSpec, others: Sequence[dict[str, Any]] = ()) -> None:
        """Start vLLM.

        Args:
            spec: what to start.
            others: options of an actor for each further node of an engine that is split.
        """
        bind_to_cores()
        in_process = not spec.gpu and spec.tensor_parallel == 1
        if in_process:
            # vLLM on a CPU takes a process for its worker otherwise, to set its threads; here the actor's environment
            # has set them.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if spec.backend == "ipc":
            # Handles of GPU memory travel to vLLM's own process as pickles; nobody else writes to its socket.
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        setup_actor_logging()
        reached("start-up")
        choose_interface()  # inherited by the processes that vLLM starts
        self._spec = spec
        self._version: int | None = None
        self._coming: int | None = None
        self._random = False
        self._asleep = False
        self._closed = False
        self._transfer = ExitStack()  # the span of a transfer under way
        from rlhf_ray.rollout.statistics import StatisticsLogger

        self._statistics = StatisticsLogger()
        # With any logger vLLM keeps statistics of every token, which costs a part of a small model's step.
        loggers: list[Any] = [lambda *_: self._statistics] if spec.statistics else []
        self._further = FurtherNodes(engine_args(spec), others)
        self._engine: Any
        with self._further.started() as args:
            if in_process:
                self._engine = InProcessEngine(args, loggers)
            else:
                self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**args), stat_loggers=loggers)
        reached("up")

    async def ready(self) -> bool:
        """Answers once the engine is up, and as long as it is; this process ends where vLLM's own has died."""
        if self._engine.errored:
            self._end_with_vllm()
        return True

    async def generate(self, requests: list[SampleRequest]) -> AsyncIterator[list[Trajectory]]:
        """Sample every request; yields trajectories as they finish, several at a time where several did.

        It ends early where the engine is closed meanwhile. Where vLLM's own process has died, this one ends, too.

        Raises:
            EngineError: the engine is STALE.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._version is None:
            raise EngineError("this engine has taken part in no complete weight transfer yet and must not generate")
        started = time.monotonic()
        pending = {asyncio.ensure_future(self._sample(request)) for request in requests}
        try:
            with activity().busy("generate") as call:
                while pending:
                    activity().owes(call, len(pending))
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    if pending:
                        shortly = GATHER_SHARE * (time.monotonic() - started)
                        more, pending = await asyncio.wait(pending, timeout=shortly)
                        done |= more
                    finished = [task.result() for task in done]
                    activity().count_tokens(sum(len(one.response_ids) for one in finished), len(finished))
                    yield finished
        except EngineDeadError:
            self._end_with_vllm()
        finally:
            for task in pending:
                task.cancel()

    def _end_with_vllm(self) -> None:
        """vLLM's own process is gone: unless it was closed, end this one, which the driver sees and makes up for."""
        if not self._closed:
            logger.error("vLLM's own process ended; the engine ends, too", exc_info=True)
            logging.shutdown()
            os._exit(1)

    async def _sample(self, request: SampleRequest) -> Trajectory:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=request.temperature,
            max_tokens=min(request.max_new_tokens, self._spec.max_model_len - len(request.prompt_ids)),
            seed=request.seed,
            stop_token_ids=list(self._spec.eos_token_ids),
            ignore_eos=not self._spec.eos_token_ids,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._run(request.prompt_ids, params, f"{request.uid}-{request.sample}-{request.seed}")
        completion = output.outputs[0]
        flat = completion.logprobs
        spans = [VersionSpan(0 if self._random else int(s.version), s.start, s.end) for s in completion.weight_versions]
        return Trajectory(
            uid=request.uid,
            sample=request.sample,
            prompt_ids=np.array(request.prompt_ids, np.int32),
            response_ids=np.array(completion.token_ids, np.int32),
            # vLLM's numbers are those of float32.
            logprobs=np.array(flat.logprobs, np.float32)[flat.start_indices],
            finish_reason=completion.finish_reason,
            versions=spans,
        )

    async def _run(self, prompt_ids: list[int], params: Any, request_id: str) -> Any:
        final = None
        async for output in self._engine.generate({"prompt_token_ids": prompt_ids}, params, request_id=request_id):
            final = output
        if final is None:
            raise EngineError(f"vLLM returned nothing for request {request_id}")
        return final

    async def probe(self, token_ids: list[int]) -> list[float]:
        """Log-probability (temperature 1) of each token after the first, given those before it."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = await self._run(token_ids, params, f"probe-{self._version}")
        rows = output.prompt_logprobs[1:]
        return [row[token].logprob for row, token in zip(rows, token_ids[1:], strict=True)]

    async def announce(self, version: int) -> None:
        """Name the weights of the next transfer."""
        self._coming = version

    # The four calls of vLLM's weight-transfer protocol, driven by the trainer's sender.

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer. An update that broke off with the connection before is closed."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._engine.collective_rpc("abandon_weight_update")
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def start_weight_update(self) -> None:
        """Stop scheduling, keep running requests frozen, and open the update. From here on the engine is STALE."""
        self._version = None
        self._transfer.enter_context(activity().busy("transfer"))
        await self._engine.pause_generation(mode="keep", clear_cache=True)
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive the weights."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        reached("receiving")
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_weight_update(self) -> None:
        """Close the update; the probe may run and frozen requests go on, new ones are refused until the commit."""
        # Named before anything is sampled from them, so that every token carries the version that it came from.
        await self._engine.finish_weight_update(weight_version=str(self._coming))
        await self._engine.resume_generation()
        self._transfer.close()

    async def commit(self) -> None:
        """Serve the announced weights, after the probe agreed."""
        self._version = self._coming
        activity().hold_version(self._coming or 0)

    async def sleep(self) -> None:
        """Drop weights and cache. The engine is STALE until a transfer, around which it is woken."""
        self._version = None
        await self._engine.sleep(level=2)
        self._asleep = True

    async def wake(self, what: str) -> None:
        """Take memory again for "weights", before a transfer, or for the "kv_cache", after it."""
        if self._asleep:
            await self._engine.wake_up([what])
            self._asleep = what != "kv_cache"

    async def serve_random_weights(self) -> None:
        """Serve, as version 0, the weights that vLLM made up at the start: for measurements without a trainer."""
        self._random, self._version = True, 0

    async def keep_statistics(self, on: bool) -> None:
        """Whether to keep statistics from here on, where the spec has them; an engine on a GPU always does."""
        if isinstance(self._engine, InProcessEngine):
            await self._engine.keep_statistics(on)

    async def statistics(self) -> dict[str, Any]:
        """`EngineStatistics` since the last call."""
        return self._statistics.take()

    async def close(self) -> None:
        """Stop vLLM's own processes. What is sampled still is not answered."""
        self._closed = True
        self._further.close()
        self._engine.shutdown()


def cpu_options(max_model_len: int) -> dict[str, Any]:
    """What vLLM needs on a CPU to sample with a seed a request.

    A prompt cut between two scheduler steps makes vLLM rewind the request's random generator, which torch's CPU
    generators cannot do: the engine dies. So prompts are never cut, and the step's token budget holds the longest.
    """
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_model_len, CPU_STEP_TOKENS)}


def engine_args(spec: EngineSpec) -> dict[str, Any]:
    """What vLLM is started with."""
    args: dict[str, Any] = {
        "model": spec.model,
        "skip_tokenizer_init": True,
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_concurrency,
        "tensor_parallel_size": spec.tensor_parallel,
        "trust_remote_code": spec.trust_remote_code,
        "enable_prefix_caching": True,
        "load_format": "dummy",
        # The distribution that was sampled from, so that trainer and engine speak of the same probabilities.
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": spec.backend},
        "worker_extension_cls": "rlhf_ray.rollout.worker_extension.WorkerExtension",
        "disable_log_stats": True,  # of vLLM's own loggers; ours have vLLM keep what they need
    }
    if spec.tensor_parallel > 1:
        # vLLM would see Ray and ask it for a bundle a worker; the actor holds the GPUs of all of them.
        args["distributed_executor_backend"] = "mp"
    if spec.gpu:
        args["gpu_memory_utilization"] = spec.gpu_memory_utilization
        args["enable_sleep_mode"] = spec.sleeps
    else:
        args |= cpu_options(spec.max_model_len)
    if spec.kv_cache_gib is not None:
        args["kv_cache_memory_bytes"] = int(spec.kv_cache_gib * 2**30)
    return args | spec.options
