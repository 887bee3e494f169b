"""What `run.py` measures: the cases, what each of them needs, and its configuration. Starts nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.bench.iteration import IterationWorkload, config_on_models
from rlhf_ray.bench.rollout import Sweep
from rlhf_ray.bench.workload import Fixed, LogNormal
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.overview import overview
from rlhf_ray.placement.plan import make_plan

# Keys of `LlamaConfig`: 0.45 billion parameters, and a model for a CPU, where only that it works is of interest.
MODEL = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4864,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TINY = MODEL | {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 256,
}

# Seconds of the ten minutes: the rest is for imports and for the end of the last case.
TOTAL_S = 570.0

Measure = Literal["rollout", "iteration", "transfer", "packing"]


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: for people and files.
        measure: which of `rlhf-ray bench` it is.
        seconds: what it may take of the ten minutes; time that others leave is shared out by it.
        gpu: changes of the configuration on a GPU.
        cpu: the same on a CPU; None where it needs a GPU.
        gpus: the fewest that it needs.
        most_gpus: the most with which it tells anything; None has no limit.
        flash_attention: whether it needs the package flash-attn.
        tensor_parallel: GPUs of the engine.
    """

    name: str
    measure: Measure
    seconds: float
    gpu: tuple[str, ...]
    cpu: tuple[str, ...] | None = None
    gpus: int = 1
    most_gpus: int | None = None
    flash_attention: bool = False
    tensor_parallel: int = 1


# The cache has what is left of an engine's share of its GPU.
CACHE = "rollout.kv_cache_gib=null"
ALONE = ("rollout.gpus=1", CACHE)
TRAINS = ("policy.gpus=1",)
EAGER = "rollout.vllm.enforce_eager=true"
ONE_GPU = (
    "placement.share=[[policy, critic, reference, reward, rollout]]",
    *("policy.gpus=0.3", "critic.gpus=0.2", "reference.gpus=0.1", "reward.gpus=0.1", "rollout.gpus=0.3"),
    *("rollout.gpu_memory_utilization=0.3", CACHE),
)
TWO_GPUS = (*("rollout.gpus=1", "policy.gpus=0.4", "critic.gpus=0.4", "reference.gpus=0.1", "reward.gpus=0.1"),)
IPC = (
    *("placement.share=[[policy, rollout]]", "policy.gpus=0.5", "rollout.gpus=0.5"),
    *("rollout.gpu_memory_utilization=0.3", CACHE),
)
CASES = (
    Case("rollout with CUDA graphs", "rollout", 85, ALONE),
    Case("rollout without CUDA graphs", "rollout", 85, (*ALONE, EAGER), (EAGER,)),
    Case("iteration, all groups on one GPU", "iteration", 125, ONE_GPU, most_gpus=1),
    Case("iteration, engine and trainers apart", "iteration", 125, TWO_GPUS, (EAGER,), gpus=2),
    Case("transfer by CUDA IPC", "transfer", 55, IPC),
    Case("transfer between GPUs", "transfer", 50, (*TRAINS, *ALONE), (EAGER,), gpus=2),
    Case("tensor-parallel engine", "rollout", 75, (*ALONE, "rollout.tensor_parallel=2"), gpus=2, tensor_parallel=2),
    Case("packing, packed_sdpa", "packing", 25, (*TRAINS, "training.attention=packed_sdpa"), ()),
    Case(
        "packing, flash attention",
        "packing",
        25,
        (*TRAINS, "training.attention=flash_attention_2"),
        flash_attention=True,
    ),
    Case("packing, compiled layers", "packing", 45, (*TRAINS, "training.compile=true"), ("training.compile=true",)),
)


def workload(*, cpu: bool) -> IterationWorkload:
    """What iterations and packing work on."""
    if cpu:
        return IterationWorkload(TINY, 6, 8, LogNormal(12, 0.9, 40))
    return IterationWorkload(MODEL, 64, 128, LogNormal(128, 0.9, 512))


def sweep(case: Case, *, cpu: bool) -> Sweep:
    """What is sampled."""
    prompt, response, count, repeats = (Fixed(8), Fixed(12), 4, 1) if cpu else (Fixed(128), Fixed(128), 128, 2)
    return Sweep([1], [case.tensor_parallel], [count], [prompt], [response], count, samples=1, repeats=repeats)


def config_of(case: Case, models: Path, count: int, *, cpu: bool) -> PPOConfig:
    """The configuration.

    Args:
        case: of `CASES`.
        models: folder of `bench.iteration.write_models`; the run goes beside them.
        count: iterations.
        cpu: whether it is for a CPU.
    """
    overrides = [f'run.dir="{models / case.name.replace(" ", "-").replace(",", "")}"']
    if cpu:
        assert case.cpu is not None
        overrides += ["rollout.kv_cache_gib=0.05", *case.cpu]
    else:
        overrides += ["training.zero_stage=1", "training.micro_batch_tokens=4096", *case.gpu]
    return config_on_models(workload(cpu=cpu), "fp32" if cpu else "bf16", models, count, overrides)


def obstacle(case: Case, config: PPOConfig, gpus: int, gpu_memory_gib: float | None, *, flash: bool) -> str | None:
    """Why a case cannot be measured on GPUs of this machine, or tells nothing there; None where it can.

    Args:
        case: of `CASES`.
        config: of `config_of`.
        gpus: how many there are.
        gpu_memory_gib: memory of each.
        flash: whether the package flash-attn is there.
    """
    if gpus < case.gpus:
        return f"needs {case.gpus} GPU{'s' * (case.gpus > 1)}, found {gpus}"
    if case.most_gpus is not None and gpus > case.most_gpus:
        return f"with {gpus} GPUs the groups are measured apart"
    if case.flash_attention and not flash:
        return "needs the package flash-attn"
    # Cores and main memory are not what is measured: groups that work one after the other use the same cores.
    node = Node(name="this machine", cpus=cores(config), gpus=gpus, gpu_memory_gib=gpu_memory_gib)
    problems = overview(config, [node]).problems
    return problems[0] if problems else None


def cores(config: PPOConfig) -> int:
    """Cores that Ray is told of, so that all groups have a place."""
    return int(make_plan(config).needed("CPU")) + 1


def time_limit(left_s: float, cases: Sequence[Case]) -> float:
    """Seconds that the first of these cases may take of what is left for all of them."""
    return left_s * cases[0].seconds / sum(case.seconds for case in cases)


def by_name(name: str) -> Case:
    """The case of this name."""
    return next(case for case in CASES if case.name == name)


def headline(case: Case, result: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """What a result comes down to: the ratio's name, and its summary."""
    return {
        "rollout": lambda: ("share of bare vLLM", result["rows"][0]["share_of_bare"]),
        "iteration": lambda: ("iteration / bare work", result["share_of_bare"]),
        "transfer": lambda: ("transfer / copy on the device", result["transfer_per_copy"]),
        "packing": lambda: ("tokens/s", result["tokens_per_s"]["drawn"]),
    }[case.measure]()
