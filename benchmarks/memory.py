"""Is the memory that `rlhf-ray plan` foretells the memory that a run takes?

    python benchmarks/memory.py --out benchmarks/results/memory.json

Starts trainer groups of several kinds, lets them work at their largest micro-batch, and compares the peak of each
process with the estimate. On a CPU the peak is that of anonymous resident memory above what the process had after its
imports; on a GPU (`--gpu`) it is what the allocator of torch reserved at its peak.
"""

import argparse
import json
import logging
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# glibc then gives every freed tensor back to the system, so that resident memory is what is in use.
os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}

import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_ray.config.sections import TrainingSection
from rlhf_ray.packing import Sequence
from rlhf_ray.placement.groups import reserve
from rlhf_ray.placement.memory import trainer
from rlhf_ray.placement.plan import Plan
from rlhf_ray.placement.shapes import find_shape
from rlhf_ray.runtime.patience import Patience
from rlhf_ray.training.group import TrainerGroup
from rlhf_ray.training.objectives import LanguageModeling, ValueUpdate
from rlhf_ray.training.trainer import TrainerSpec

GIB = 2**30
TIMEOUT_S = 600.0
LENGTH = 256


@dataclass(frozen=True)
class Cell:
    """One trainer to measure: its head, ranks and training section."""

    head: str
    ranks: int
    zero_stage: int
    dtype: str
    checkpointing: bool
    tokens: int


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


def make_model(folder: Path, head: str) -> str:
    """A Llama of 50 million parameters, large enough that its size decides and not the libraries'."""
    config = LlamaConfig(
        hidden_size=768,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2048,
        vocab_size=8192,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        num_labels=1,
        pad_token_id=0,
    )
    model_class = LlamaForCausalLM if head == "causal" else LlamaForSequenceClassification
    path = folder / head
    model_class(config).save_pretrained(path)
    return str(path)


def peak(actor: Any, *, gpu: bool) -> Any:
    """Bytes in use now and at the peak since the last call, read in the actor's process."""

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
        return sizes["RssAnon"], sizes["VmHWM"] - sizes["RssFile"] - sizes["RssShmem"]

    return ray.get(actor.__ray_call__.remote(read), timeout=TIMEOUT_S)


def imports(_: Any) -> None:
    """What a trainer imports before it holds a model."""
    import deepspeed  # noqa: F401
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

    import rlhf_ray.models.loading
    import rlhf_ray.training.objectives  # noqa: F401


def measure(cell: Cell, model: str, logs: Path, *, gpu: bool) -> dict[str, Any]:
    """Peak of the first rank over two optimizer steps of two micro-batches, beside its estimate."""
    section = TrainingSection(
        zero_stage=cell.zero_stage,
        dtype=cell.dtype,
        gradient_checkpointing=cell.checkpointing,
        micro_batch_tokens=cell.tokens,
    )
    spec = TrainerSpec("measured", model, cell.head, section, 1e-5, total_steps=10, seed=0, gpu=gpu)
    bundle = {"CPU": 1.0, "GPU": 1.0} if gpu else {"CPU": 1.0}
    with reserve(Plan([dict(bundle)] * cell.ranks, {"policy": list(range(cell.ranks))}), logs) as placement:
        group = TrainerGroup(spec, placement, "policy", Patience(TIMEOUT_S, TIMEOUT_S))
        try:
            ray.get([actor.__ray_call__.remote(imports) for actor in group._actors], timeout=TIMEOUT_S)
            base, _ = peak(group._actors[0], gpu=gpu)
            group.start().result()
            sequences = [_sequence(cell.head) for _ in range(2 * cell.ranks * cell.tokens // LENGTH)]
            objective = LanguageModeling() if cell.head == "causal" else ValueUpdate(0.2)
            for _ in range(2):
                group.step(sequences, objective).result()
            _, highest = peak(group._actors[0], gpu=gpu)
        finally:
            group.stop()
    shape = find_shape(model)
    assert shape is not None
    parts = trainer(shape, section, cell.ranks, on_gpu=gpu, scalar=cell.head == "scalar").parts
    parts.pop("process")
    expected = sum(parts.values())
    return {
        **vars(cell),
        "parameters": shape.parameters,
        "measured_gib": (highest - base) / GIB,
        "estimated_gib": expected / GIB,
        "ratio": expected / (highest - base),
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
    cells = [cell for cell in CELLS if not options.gpu or cell.ranks <= torch.cuda.device_count()]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        models = {head: make_model(Path(folder), head) for head in ("causal", "scalar")}
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            for cell in cells:
                results.append(measure(cell, models[cell.head], Path(folder), gpu=options.gpu))
                row = results[-1]
                print(
                    f"{cell}: measured {row['measured_gib']:.3f} GiB, estimated {row['estimated_gib']:.3f}, "
                    f"ratio {row['ratio']:.3f}",
                    flush=True,
                )
        finally:
            ray.shutdown()
    worst = max(abs(row["ratio"] - 1) for row in results)
    print(f"largest deviation: {worst:.1%}")
    if options.out:
        hardware = torch.cuda.get_device_name() if options.gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores"
        report = {"hardware": hardware, "torch": torch.__version__, "largest_deviation": worst, "cells": results}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
