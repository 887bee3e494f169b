"""What a rollout engine returns: one sampled response and where each of its tokens came from."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class VersionSpan:
    """Response tokens `[start, end)` were sampled with the policy weights of `version`."""

    version: int
    start: int
    end: int


@dataclass(eq=False)
class Trajectory:
    """One sampled response. Its arrays are not to be written to.

    Attributes:
        uid: the prompt's identity, unique within the run.
        sample: index of this response among the prompt's samples.
        prompt_ids: prompt tokens exactly as the engine saw them, [P].
        response_ids: sampled tokens, the end-of-sequence token included when it was sampled, [R].
        logprobs: the engine's log-probability of each response token at the sampling temperature, [R].
        finish_reason: "stop" (end-of-sequence sampled) or "length" (cut at the token limit).
        versions: which policy version sampled which tokens, in order, covering all of them.
        row: the prompt's source row, for reward functions (columns such as `answer`).
    """

    uid: str
    sample: int
    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish_reason: str
    versions: list[VersionSpan]
    row: dict[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle arrays as bytes.

        They are read sooner than arrays, and, unlike those, do not hold on to Ray's shared memory as long as they live.
        """
        ids = [np.asarray(ids, np.int32).tobytes() for ids in (self.prompt_ids, self.response_ids)]
        logprobs = np.asarray(self.logprobs, np.float32).tobytes()
        return _restored, (self.uid, self.sample, *ids, logprobs, self.finish_reason, self.versions, self.row)

    @property
    def truncated(self) -> bool:
        """Whether the response was cut at the token limit rather than ended by the model."""
        return self.finish_reason == "length"

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Prompt and response, [P + R]."""
        return np.concatenate([self.prompt_ids, self.response_ids], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt_ids) + len(self.response_ids)


def _restored(
    uid: str,
    sample: int,
    prompt_ids: bytes,
    response_ids: bytes,
    logprobs: bytes,
    finish_reason: str,
    versions: list[VersionSpan],
    row: dict[str, Any],
) -> Trajectory:
    return Trajectory(
        uid,
        sample,
        np.frombuffer(prompt_ids, np.int32),
        np.frombuffer(response_ids, np.int32),
        np.frombuffer(logprobs, np.float32),
        finish_reason,
        versions,
        row,
    )
