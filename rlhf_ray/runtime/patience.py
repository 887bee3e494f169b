"""How long to wait for an answer: from how long answers of its kind took before."""

from collections import deque

from rlhf_ray.config.sections import RunSection

# An answer may take this many times as long as the longest of the last ones.
FACTOR = 10.0
REMEMBERED = 20
# From so many on the past says something; the first ones compile and warm up.
ENOUGH = 3


class Patience:
    """The deadlines of a run's phases.

    A phase that is new gets the ceiling. One that was quick so far is given up sooner, so that a dead one is not waited
    for; one that takes longer and longer gets more, so that a slow one is not shot.

    Args:
        floor_s: no deadline is shorter, in seconds.
        ceiling_s: none is longer.
    """

    def __init__(self, floor_s: float, ceiling_s: float) -> None:
        self.floor_s = min(floor_s, ceiling_s)
        self.ceiling_s = ceiling_s
        self._took: dict[str, deque[float]] = {}

    def limit(self, phase: str) -> float:
        """Seconds to wait for an answer of this phase."""
        past = list(self._took.get(phase, ()))  # a copy: other threads remember theirs
        if len(past) < ENOUGH:
            return self.ceiling_s
        return min(self.ceiling_s, max(self.floor_s, FACTOR * max(past)))

    def took(self, phase: str, seconds: float) -> None:
        """Remember how long an answer took, from the moment it was asked for."""
        self._took.setdefault(phase, deque(maxlen=REMEMBERED)).append(seconds)


def patience_of(run: RunSection) -> Patience:
    """That of a run, from its configuration."""
    return Patience(run.min_timeout_s, run.timeout_s)
