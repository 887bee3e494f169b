"""vLLM alone: the same requests through `LLM.generate`, as the measure of what the system adds."""

import os
import time
from typing import Any

from rlhf_ray.bench.workload import Workload
from rlhf_ray.rollout.engine import EngineSpec, engine_args
from rlhf_ray.tracking.logs import setup_actor_logging

# What the system needs of an engine, and a bare one does without. The worker extension stays: it does nothing but end
# vLLM's own processes, which hold a GPU's memory, with the actor.
OURS = ("weight_transfer_config", "enable_sleep_mode")


class BareEngine:
    """A Ray actor with vLLM's offline engine and the same model, threads and limits as a rollout engine."""

    def __init__(self, spec: EngineSpec) -> None:
        if not spec.gpu and spec.tensor_parallel == 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        setup_actor_logging()
        args = {name: value for name, value in engine_args(spec).items() if name not in OURS}
        self._llm = LLM(**args)

    def ready(self) -> bool:
        """Answers once the engine is up."""
        return True

    def run(self, workload: Workload, plain: bool = False) -> float:
        """Seconds to sample all of it.

        Args:
            workload: what to sample.
            plain: without what training needs of a sample, its seed and the log-probabilities of its tokens.
        """
        from vllm import SamplingParams

        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in workload.prompts for _ in range(workload.samples)]
        params = [
            SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False)
            if plain
            else SamplingParams(
                temperature=1.0,
                max_tokens=length,
                ignore_eos=True,
                detokenize=False,
                seed=index,
                logprobs=0,
                flat_logprobs=True,
            )
            for index, length in enumerate(workload.lengths)
        ]
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        found = sum(len(output.outputs[0].token_ids) for output in outputs)
        if found != workload.generated_tokens:
            raise AssertionError(f"vLLM sampled {found} tokens where {workload.generated_tokens} were asked for")
        return seconds
