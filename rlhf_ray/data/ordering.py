"""The order in which items are visited: a new permutation each epoch, with a position that can be saved."""

from typing import Any

import numpy as np

from rlhf_ray.errors import CheckpointError, shortened


class EpochOrder:
    """Visits every item exactly once an epoch, in an order that depends on the seed and the epoch alone.

    The permutation sorts the raw 64-bit output of Philox keyed by (seed, epoch), which numpy keeps stable
    across its versions, unlike `Generator.permutation`. Batch size, number of ranks and what was drawn before
    do not enter.

    Args:
        num_items: number of items, at least 1.
        seed: 0 or more, below 2**64.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, num_items: int, seed: int):
        if num_items < 1:
            raise ValueError(f"num_items must be at least 1, found {num_items}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), found {seed}")
        self._num_items = num_items
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._permutation()

    @property
    def epoch(self) -> int:
        """Number of complete passes so far."""
        return self._epoch

    @property
    def position(self) -> int:
        """Items already visited in this epoch, in [0, num_items)."""
        return self._position

    def next(self, n: int) -> list[int]:
        """The next `n` item indices; where an epoch ends within them, the next one begins.

        Raises:
            ValueError: n is below 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, found {n}")
        taken: list[int] = []
        while len(taken) < n:
            part = self._order[self._position : self._position + n - len(taken)]
            taken += part.tolist()
            self._position += len(part)
            if self._position == self._num_items:
                self._epoch += 1
                self._position = 0
                self._order = self._permutation()
        return taken

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to continue at the same place."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "num_items": self._num_items,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            CheckpointError: the state belongs to another number of items or another seed, whose order it
                would be.
        """
        for name, own in (("num_items", self._num_items), ("seed", self._seed)):
            if state[name] != own:
                raise CheckpointError(
                    f"the saved data order has {name} {shortened(repr(state[name]))} and this run has {own}, so the "
                    "items visited so far are not the same: resume with the data and seed that the checkpoint was "
                    "made with"
                )
        epoch, position = state["epoch"], state["position"]
        if not (type(epoch) is type(position) is int and 0 <= epoch < 2**64 and 0 <= position < self._num_items):
            raise CheckpointError(
                f"the saved data order is at position {shortened(repr(position))} of epoch {shortened(repr(epoch))}, "
                f"and an epoch has {self._num_items} items: remove the checkpoint to continue from the one before"
            )
        self._epoch, self._position = epoch, position
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        bits = np.random.Philox(key=np.array([self._seed, self._epoch], dtype=np.uint64))
        return np.argsort(bits.random_raw(self._num_items), kind="stable")
