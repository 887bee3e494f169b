"""`rollout.vllm`: further options of vLLM, checked against the version that is installed without importing it."""

import ast
import difflib
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ConfigError

# Options that follow from keys of their own.
KEYS = {
    "model": "policy.path",
    "dtype": "rollout.dtype",
    "max_model_len": "data.max_tokens and rollout.max_new_tokens",
    "max_num_seqs": "rollout.max_concurrency",
    "tensor_parallel_size": "rollout.tensor_parallel",
    "nnodes": "rollout.nodes_per_engine",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "kv_cache_memory_bytes": "rollout.kv_cache_gib",
    "trust_remote_code": "policy.trust_remote_code",
    "enable_sleep_mode": "placement.share",
}
# Those that the weight transfer, the placement of processes or the log-probabilities of a run rest on.
OURS = frozenset(
    (
        *("skip_tokenizer_init", "load_format", "logprobs_mode", "weight_transfer_config", "worker_extension_cls"),
        *("worker_cls", "disable_log_stats", "distributed_executor_backend", "node_rank", "master_addr", "master_port"),
        *("pipeline_parallel_size", "data_parallel_size", "disable_custom_all_reduce", "max_logprobs"),
    )
)
# vLLM on a CPU cannot rewind a request's random generator, which cutting prompts would need.
OURS_ON_CPU = frozenset(("enable_chunked_prefill", "max_num_batched_tokens"))


@cache
def known_options() -> frozenset[str]:
    """Names of the options of the installed vLLM's engine, read off its source: importing it takes 15 seconds."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ConfigError("rollout.vllm: vLLM is not installed here, so that its options cannot be checked; install it")
    source = (Path(spec.origin).parent / "engine" / "arg_utils.py").read_text()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    return frozenset(
        line.target.id
        for name in ("EngineArgs", "AsyncEngineArgs")
        for line in classes[name].body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    )


def check_options(options: Mapping[str, Any], *, gpu: bool) -> None:
    """Refuse options that the installed vLLM does not know, or that the run itself sets.

    Raises:
        ConfigError: it names all of them.
    """
    problems = []
    for name in options:
        if name in KEYS:
            problems.append(f"rollout.vllm.{name}: follows from {KEYS[name]}; set that")
        elif name in OURS or (name in OURS_ON_CPU and not gpu):
            where = "" if name in OURS else " on a CPU"
            problems.append(f"rollout.vllm.{name}: is set by the run itself{where}; leave it out")
        elif name not in known_options():
            near = difflib.get_close_matches(name, known_options(), n=1)
            meant = f"did you mean {near[0]}?" if near else "see the engine arguments in vLLM's documentation"
            problems.append(f"rollout.vllm.{name}: the installed vLLM has no such option; {meant}")
    if problems:
        raise ConfigError("\n".join(problems))
