"""An optimizer's master weights and moments, moved to main memory for a while and back."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.training.state import MOMENTS


def free_optimizer(engine: Any, stage: int, *, pin: bool) -> None:
    """Move them out; the weights and everything that reads them stay as they are.

    Args:
        engine: a DeepSpeed engine.
        stage: its ZeRO stage, 1 to 3.
        pin: whether to keep them in page-locked memory, for quick copies to a GPU.
    """
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as States

    if stage < 3:
        engine.offload_states(include=[States.hp_params, States.optim_states], pin_memory=pin)
        return
    engine.optimizer.empty_partition_cache()
    for tensor in _states_of_stage_3(engine):
        tensor.data = torch.empty_like(tensor, device="cpu", pin_memory=pin).copy_(tensor)


def restore_optimizer(engine: Any, stage: int) -> None:
    """Move them back; nothing happens where they are back already."""
    from deepspeed.accelerator import get_accelerator

    if stage < 3:
        engine.reload_states()
        return
    for tensor in _states_of_stage_3(engine):
        tensor.data = tensor.data.to(get_accelerator().current_device_name())


def _states_of_stage_3(engine: Any) -> Iterator[Tensor]:
    """What DeepSpeed itself moves in stage 3 for its own FusedAdam alone, though any AdamW has the same."""
    if engine.bfloat16_enabled():  # in fp32 the master weights are the weights
        yield from engine.optimizer.fp32_partitioned_groups_flat
    for state in engine.optimizer.optimizer.state.values():
        yield from (state[name] for name in MOMENTS if name in state)
