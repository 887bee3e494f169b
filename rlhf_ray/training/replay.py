"""A batch that could not be trained on, on disk, so that the update can be taken again by hand.

    sequences, group = load_batch("runs/demo/bad_batches/policy_000012")

gives what `TrainerGroup.step` was called with, beside the objective; `about.json` has the objective and the metrics.
"""

import json
import math
from collections.abc import Sequence as Items
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_ray.packing import Sequence

TENSORS = "batch.safetensors"
ABOUT = "about.json"
TOKEN_FIELD, FIELD = "token_fields/", "fields/"


def save_batch(
    folder: Path, sequences: Items[Sequence], group: Items[int] | None, objective: Any, metrics: dict[str, float]
) -> dict[str, int]:
    """Write a batch into the folder: sequences end to end as safetensors, the rest as JSON.

    Args:
        group: of `TrainerGroup.step`.
        objective: a dataclass; its name and values are written.

    Returns:
        Which of its fields have numbers that are NaN or infinite, and how many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "lengths": torch.tensor([len(one) for one in sequences]),
        "input_ids": torch.cat([one.input_ids for one in sequences]),
        "loss_mask": torch.cat([one.loss_mask for one in sequences]),
    }
    if group is not None:
        tensors["group"] = torch.tensor(list(group))
    for name in sequences[0].token_fields:
        tensors[f"{TOKEN_FIELD}{name}"] = torch.cat([one.token_fields[name] for one in sequences])
    for name in sequences[0].fields:
        tensors[f"{FIELD}{name}"] = torch.tensor([one.fields[name] for one in sequences], dtype=torch.float64)
    save_file(tensors, folder / TENSORS)
    not_finite = _not_finite(tensors)
    about = {
        "objective": {"name": type(objective).__name__} | asdict(objective),
        # JSON has no NaN.
        "metrics": {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()},
        "not_finite": not_finite,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    return not_finite


def load_batch(folder: str | Path) -> tuple[list[Sequence], list[int] | None]:
    """The sequences that `save_batch` wrote, and the group of each."""
    tensors = load_file(Path(folder) / TENSORS)
    lengths = tensors.pop("lengths").tolist()
    group = tensors.pop("group").tolist() if "group" in tensors else None
    fields = {name: tensors.pop(name).tolist() for name in list(tensors) if name.startswith(FIELD)}
    of_tokens = {name: values.split(lengths) for name, values in tensors.items()}
    sequences = [
        Sequence(
            of_tokens["input_ids"][i],
            of_tokens["loss_mask"][i],
            {name.removeprefix(TOKEN_FIELD): of_tokens[name][i] for name in of_tokens if name.startswith(TOKEN_FIELD)},
            {name.removeprefix(FIELD): values[i] for name, values in fields.items()},
        )
        for i in range(len(lengths))
    ]
    return sequences, group


def _not_finite(tensors: dict[str, Tensor]) -> dict[str, int]:
    counts = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in tensors.items()}
    return {name.rpartition("/")[2]: count for name, count in counts.items() if count}
