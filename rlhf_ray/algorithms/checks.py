"""What every function of this package asks of its inputs.

One rule for numbers that are not finite: they stop the step. A NaN or infinite log-probability, value or
reward is never dropped, masked or replaced: a loss that quietly ignores it hides a model that has diverged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from rlhf_ray.errors import EngineError

_noted: ContextVar[list[str] | None] = ContextVar("noted", default=None)


@contextmanager
def noting_nonfinite() -> Iterator[list[str]]:
    """Inside the block, `require_finite` adds to the list that it yields what it would raise.

    For a rank of a trainer, which must go through its collectives with the others: the step is stopped by its caller.
    """
    noted: list[str] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def require_same_shape(**tensors: Tensor) -> None:
    """Check that all `tensors` are 1-D and of one shape.

    Raises:
        ValueError: they are not, so that the caller has aligned them wrongly.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"expected 1-D tensors of one shape, found {shapes}")


def require_finite(**tensors: Tensor) -> None:
    """Check that no element of `tensors` is NaN or infinite.

    Raises:
        EngineError: one is, and nobody notes it; the message names the tensor, how many elements and the first of them.
    """
    for name, tensor in tensors.items():
        finite = torch.isfinite(tensor)
        if not finite.all():
            bad = (~finite).flatten().nonzero().squeeze(-1)
            told = (
                f"{name} must be finite, found {len(bad)} of {tensor.numel()} elements that are not, the "
                f"first at {int(bad[0])}: {float(tensor.flatten()[bad[0]])}. The model that computed it has "
                "diverged or overflows its precision: lower the learning rate, or use bfloat16 or float32"
            )
            noted = _noted.get()
            if noted is None:
                raise EngineError(told)
            noted.append(told)


def require_boundaries(cu: Tensor, num_tokens: int) -> None:
    """Check that `cu` [S+1] cuts `num_tokens` flat tokens into sequences of at least one token each.

    Raises:
        ValueError: it does not.
    """
    if cu.dim() != 1 or len(cu) < 1 or int(cu[0]) != 0 or int(cu[-1]) != num_tokens or (cu.diff() < 1).any():
        raise ValueError(
            f"boundaries must rise strictly from 0 to {num_tokens}, the number of tokens, found {cu.tolist()}"
        )
