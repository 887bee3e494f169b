"""Is the memory that `rlhf-ray plan` foretells the memory that a run takes?

    python benchmarks/memory.py --out benchmarks/results/memory.json

Starts trainers, scorers and engines of several kinds, lets them work at their largest micro-batch, and compares the
peak of each process with the estimate; fails where one is off by more than 15 %. On a CPU the peak is that of anonymous
resident memory above what the process had after its imports, with an allocator that keeps nothing; on a GPU (`--gpu`)
it is what the allocator of torch reserved at its peak.
"""

import argparse
import json
import os
import platform
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

# glibc then gives every freed tensor back to the system, so that resident memory is what is in use.
os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}

import ray
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_ray.config import PPOConfig, from_dict
from rlhf_ray.config.sections import TrainingSection
from rlhf_ray.driver.groups import engine_spec
from rlhf_ray.packing import Sequence
from rlhf_ray.placement.groups import reserve
from rlhf_ray.placement.memory import (
    CPU_ENGINE_GIB,
    CPU_PROCESS_GIB,
    cache_bytes_per_token,
    estimate,
    scorer,
    trainer,
)
from rlhf_ray.placement.plan import Plan
from rlhf_ray.placement.shapes import find_shape
from rlhf_ray.rollout.engine import RolloutEngine, SampleRequest
from rlhf_ray.runtime.cluster import KEPT_MEMORY, own_cluster
from rlhf_ray.runtime.patience import Patience
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.scoring.actors import Completion, ModelSpec, ReferenceActor, RewardModelActor
from rlhf_ray.training.group import TrainerGroup
from rlhf_ray.training.objectives import LanguageModeling, ValueUpdate
from rlhf_ray.training.trainer import TrainerSpec

GIB = 2**30
TIMEOUT_S = 600.0
LENGTH = 256
# What `rlhf-ray plan` promises of its estimates.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Scoring:
    """A reference or reward model to measure."""

    group: str
    dtype: str
    tokens: int


@dataclass(frozen=True)
class Engine:
    """A rollout engine to measure."""

    dtype: str
    kv_cache_gib: float
    max_concurrency: int


@dataclass(frozen=True)
class Cell:
    """One trainer to measure: its head, ranks and training section."""

    head: str
    ranks: int
    zero_stage: int
    dtype: str
    checkpointing: bool
    tokens: int


SCORERS = [Scoring("reference", "fp32", 4096), Scoring("reference", "bf16", 16384), Scoring("reward", "fp32", 8192)]
ENGINES = [Engine("fp32", 0.25, 32), Engine("bf16", 0.5, 64)]
CELLS = [
    Cell("causal", 1, 0, "fp32", False, 4096),
    Cell("causal", 1, 0, "fp32", True, 4096),
    Cell("causal", 1, 0, "bf16", False, 4096),
    Cell("causal", 1, 1, "fp32", False, 512),
    Cell("causal", 2, 1, "fp32", False, 2048),
    Cell("causal", 2, 1, "bf16", False, 2048),
    Cell("causal", 2, 2, "bf16", True, 4096),
    Cell("causal", 2, 3, "fp32", False, 2048),
    Cell("causal", 2, 3, "bf16", True, 1024),
    Cell("scalar", 1, 1, "fp32", False, 2048),
    Cell("scalar", 1, 0, "fp32", False, 4096),
]


def make_model(folder: Path, head: str, *, small: bool = False) -> str:
    """A Llama of 50 million parameters, large enough that its size decides and not the libraries'; or a tiny one."""
    config = LlamaConfig(
        hidden_size=64 if small else 768,
        num_hidden_layers=1 if small else 6,
        num_attention_heads=2 if small else 12,
        num_key_value_heads=1 if small else 4,
        intermediate_size=128 if small else 2048,
        vocab_size=512 if small else 8192,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        num_labels=1,
        pad_token_id=0,
    )
    model_class = LlamaForCausalLM if head == "causal" else LlamaForSequenceClassification
    path = folder / (head + "-small" * small)
    model_class(config).save_pretrained(path)
    words = Tokenizer(WordLevel({str(number): number for number in range(config.vocab_size)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1").save_pretrained(path)
    return str(path)


def peak(actor: Any, *, gpu: bool, mapped: bool = False) -> Any:
    """Bytes in use now and at the peak since the last call, read in the actor's process; of files too if `mapped`."""

    def read(_: Any) -> tuple[int, int]:
        import gc

        import torch

        gc.collect()
        if gpu:
            found = torch.cuda.memory_allocated(), torch.cuda.max_memory_reserved()
            torch.cuda.reset_peak_memory_stats()
            return found
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        # Weights that are read as they are in the file stay mapped from it.
        files = 0 if mapped else sizes["RssFile"] + sizes["RssShmem"]
        return sizes["VmRSS"] - files, sizes["VmHWM"] - files

    return ray.get(actor.__ray_call__.remote(read), timeout=TIMEOUT_S)


def imports(_: Any, small: str) -> None:
    """What a trainer or scorer imports before it holds its model, and the code of torch and transformers that it runs:
    that of a tiny model."""
    import deepspeed  # noqa: F401
    from transformers import AutoTokenizer

    from rlhf_ray.models.loading import load_causal_lm

    AutoTokenizer.from_pretrained(small)
    ids, position = torch.ones(64, dtype=torch.long), torch.arange(64)
    for dtype in ("fp32", "bf16"):
        model = load_causal_lm(small, dtype)
        logprobs, _ = model(ids, position, torch.tensor([0, 64], dtype=torch.int32), target_index=position[1:])
        logprobs.sum().backward()


def section_of(cell: Cell) -> TrainingSection:
    """The training section of a cell."""
    return TrainingSection(
        zero_stage=cell.zero_stage,
        dtype=cell.dtype,
        gradient_checkpointing=cell.checkpointing,
        micro_batch_tokens=cell.tokens,
    )


def foretold(cell: Cell | Scoring | Engine, model: str, small: str, *, gpu: bool) -> dict[str, float]:
    """Bytes by part: of an engine those that it has more than a tiny one, of others those beside their libraries."""
    if isinstance(cell, Engine):
        parts = dict(estimate(engine_config(cell, model), None)["rollout"].parts)
        for name, size in estimate(engine_config(tiny(cell), small), None)["rollout"].parts.items():
            parts[name] -= size
        return parts
    shape = find_shape(model)
    assert shape is not None
    if isinstance(cell, Scoring):
        parts = scorer([shape], cell.dtype, cell.tokens, on_gpu=gpu, scalar=cell.group == "reward").parts
    else:
        parts = trainer(shape, section_of(cell), cell.ranks, on_gpu=gpu, scalar=cell.head == "scalar").parts
    return {name: size for name, size in parts.items() if name != "process"}


def measure(cell: Cell, model: str, small: str, logs: Path, *, gpu: bool) -> dict[str, Any]:
    """Peak of the first rank over two optimizer steps of two micro-batches, beside its estimate."""
    spec = TrainerSpec("measured", model, cell.head, section_of(cell), 1e-5, total_steps=10, seed=0, gpu=gpu)
    bundle = {"CPU": 1.0, "GPU": 1.0} if gpu else {"CPU": 1.0}
    with reserve(Plan([dict(bundle)] * cell.ranks, {"policy": list(range(cell.ranks))}), logs) as placement:
        group = TrainerGroup(spec, placement, "policy", Supervisor(logs.parent, Patience(TIMEOUT_S, TIMEOUT_S)))
        try:
            ray.get([actor.__ray_call__.remote(imports, small) for actor in group._actors], timeout=TIMEOUT_S)
            base, _ = peak(group._actors[0], gpu=gpu)
            group.start().result()
            sequences = [_sequence(cell.head) for _ in range(2 * cell.ranks * cell.tokens // LENGTH)]
            objective = LanguageModeling() if cell.head == "causal" else ValueUpdate(0.2)
            for _ in range(2):
                group.step(sequences, objective).result()
            _, highest = peak(group._actors[0], gpu=gpu)
        finally:
            group.stop()
    return vars(cell) | compared(foretold(cell, model, small, gpu=gpu), highest - base)


def measure_scorer(cell: Scoring, model: str, small: str, *, gpu: bool) -> dict[str, Any]:
    """Peak of a scorer over two rounds of two batches, beside its estimate."""
    spec = ModelSpec(model, cell.dtype, cell.tokens, gpu)
    reward = cell.group == "reward"
    arguments = (spec, model, False) if reward else (spec, 1.0)
    actor_class: Any = ray.remote(RewardModelActor if reward else ReferenceActor)
    actor = actor_class.options(num_cpus=1, num_gpus=int(gpu)).remote(*arguments)
    try:
        ray.get(actor.__ray_call__.remote(imports, small), timeout=TIMEOUT_S)
        base, _ = peak(actor, gpu=gpu, mapped=True)
        ray.get(actor.load.remote(), timeout=TIMEOUT_S)
        sequences = [_sequence("causal") for _ in range(2 * cell.tokens // LENGTH)]
        completions = [Completion(one.input_ids.tolist(), "", "") for one in sequences]
        for _ in range(2):
            ray.get(actor.score.remote(completions if reward else sequences), timeout=TIMEOUT_S)
        _, highest = peak(actor, gpu=gpu, mapped=True)
    finally:
        ray.kill(actor)
    libraries = {} if gpu else {"libraries_gib": base / GIB, "libraries_estimated_gib": CPU_PROCESS_GIB}
    return vars(cell) | libraries | compared(foretold(cell, model, small, gpu=gpu), highest - base)


def tiny(cell: Engine) -> Engine:
    """What an engine is compared with."""
    return Engine(cell.dtype, 0.01, 1)


def engine_config(cell: Engine, model: str) -> PPOConfig:
    """The configuration of a run with such an engine."""
    values = {
        "run": {"dir": "unwritten"},
        "data": {"path": "unread", "max_tokens": LENGTH},
        "policy": {"path": model},
        "reward": {"models": [{"path": model}]},
        "rollout": {**vars(cell), "vllm": {"enforce_eager": True}, "max_new_tokens": LENGTH},
        "ppo": {"iterations": 1, "prompts_per_iteration": 1},
    }
    config = from_dict(values, "ppo")
    assert isinstance(config, PPOConfig)
    return config


def engine_peak(config: PPOConfig, requests: int) -> tuple[int, int]:
    """Peak bytes of vLLM's process, and of the actor beside it, while it samples so many responses."""

    def read(_: Any) -> tuple[int, int]:
        import psutil

        (child,) = [one for one in psutil.Process().children() if "EngineCor" in " ".join(one.cmdline())]
        peaks = []
        for process in (child.pid, "self"):
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            peaks += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
        return peaks[0], peaks[1]

    actor_class: Any = ray.remote(RolloutEngine)
    engine = actor_class.options(num_cpus=1, max_concurrency=4).remote(engine_spec(config, eos_token_ids=()))
    try:
        ray.get(engine.serve_random_weights.remote(), timeout=TIMEOUT_S)
        asked = [
            SampleRequest(str(i), 0, torch.randint(1, 500, (LENGTH,)).tolist(), i, 1.0, LENGTH // 4)
            for i in range(requests)
        ]
        for part in engine.generate.options(num_returns="streaming").remote(asked):
            ray.get(part, timeout=TIMEOUT_S)
        return ray.get(engine.__ray_call__.remote(read), timeout=TIMEOUT_S)
    finally:
        ray.wait([engine.close.remote()], timeout=10)
        ray.kill(engine)


def measure_engine(cell: Engine, model: str, small: str) -> dict[str, Any]:
    """By how much an engine on a CPU outgrows one of a tiny model with little cache, beside what is foretold of that.

    On a GPU there is nothing to foretell: vLLM takes the share that it is given, and makes the cache of the rest.
    """
    config = engine_config(cell, model)
    shape = find_shape(model)
    assert shape is not None
    # A page of the cache counts once it was written: so many responses that every block is used.
    in_cache = cell.kv_cache_gib * GIB / cache_bytes_per_token(config, shape)
    measured, _ = engine_peak(config, requests=int(1.5 * in_cache / LENGTH))
    least, actor = engine_peak(engine_config(tiny(cell), small), requests=1)
    libraries = {"libraries_gib": (least + actor) / GIB, "libraries_estimated_gib": CPU_ENGINE_GIB}
    return (
        {"group": "rollout", **vars(cell)}
        | libraries
        | compared(foretold(cell, model, small, gpu=False), measured - least)
    )


def compared(parts: dict[str, float], measured: float) -> dict[str, Any]:
    """An estimate beside what was measured."""
    expected = sum(parts.values())
    return {
        "measured_gib": measured / GIB,
        "estimated_gib": expected / GIB,
        "ratio": expected / measured,
        "parts_gib": {name: size / GIB for name, size in parts.items()},
    }


def _sequence(head: str) -> Sequence:
    mask = torch.ones(LENGTH, dtype=torch.bool)
    mask[0] = False
    names = () if head == "causal" else ("old_values", "returns")
    return Sequence(torch.randint(1, 8000, (LENGTH,)), mask, {name: torch.zeros(LENGTH) for name in names}, {})


def main() -> None:
    """Measure every cell and print a line for each; write all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--gpu", action="store_true", help="measure on GPUs")
    options = parser.parse_args()
    for name in KEPT_MEMORY:
        KEPT_MEMORY[name] = "65536"  # in the processes that `reserve` places, too
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {head: make_model(folder, head) for head in ("causal", "scalar")}
        small = make_model(folder, "causal", small=True)
        heads = {"reference": "causal", "reward": "scalar"}
        with own_cluster(4):
            for row in chain(
                (measure_engine(one, models["causal"], small) for one in ENGINES if not options.gpu),
                (measure_scorer(one, models[heads[one.group]], small, gpu=options.gpu) for one in SCORERS),
                (
                    measure(cell, models[cell.head], small, folder, gpu=options.gpu)
                    for cell in CELLS
                    if not options.gpu or cell.ranks <= torch.cuda.device_count()
                ),
            ):
                results.append(row)
                print(json.dumps(row), flush=True)
    worst = max(abs(row["ratio"] - 1) for row in results)
    libraries = [one["libraries_estimated_gib"] / one["libraries_gib"] for one in results if "libraries_gib" in one]
    worst = max(worst, *(abs(ratio - 1) for ratio in libraries), 0.0)
    print(f"largest deviation: {worst:.1%}")
    if options.out:
        hardware = torch.cuda.get_device_name() if options.gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores"
        report = {"hardware": hardware, "torch": torch.__version__, "largest_deviation": worst, "cells": results}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if worst > TOLERANCE:
        raise SystemExit(f"an estimate is off by {worst:.1%}, more than {TOLERANCE:.0%}")


if __name__ == "__main__":
    main()
