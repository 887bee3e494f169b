"""What a measurement samples: prompts of random tokens, and responses of lengths that are known beforehand."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from rlhf_ray.errors import ConfigError

FORMS = "a number of tokens (128), lognormal:MEDIAN:SIGMA:LARGEST (lognormal:48:0.9:384) or replay:RUN"
# Ids below are often special tokens.
FIRST_ID = 10


class Lengths(Protocol):
    """How long responses (or prompts) are."""

    @property
    def largest(self) -> int:
        """The most tokens that one may have."""

    def draw(self, count: int, generator: np.random.Generator) -> list[int]:
        """That many lengths, in tokens."""


@dataclass(frozen=True)
class Fixed:
    """All of one length."""

    largest: int

    def draw(self, count: int, generator: np.random.Generator) -> list[int]:
        """That many times the same."""
        return [self.largest] * count


@dataclass(frozen=True)
class LogNormal:
    """exp(N(ln median, sigma^2)), rounded, between 1 and the largest."""

    median: float
    sigma: float
    largest: int

    def draw(self, count: int, generator: np.random.Generator) -> list[int]:
        """Independent draws."""
        drawn = np.exp(generator.normal(math.log(self.median), self.sigma, count))
        return np.clip(np.rint(drawn), 1, self.largest).astype(int).tolist()


@dataclass(frozen=True)
class Replayed:
    """The lengths of the responses that a run has sampled, drawn with replacement."""

    lengths: tuple[int, ...]

    @property
    def largest(self) -> int:
        """The longest of them."""
        return max(self.lengths)

    def draw(self, count: int, generator: np.random.Generator) -> list[int]:
        """Independent draws."""
        return generator.choice(self.lengths, count).tolist()


def parse_lengths(text: str, option: str) -> Lengths:
    """Lengths as the command line writes them; see `FORMS`.

    Raises:
        ConfigError: it is none of the forms, or the run has no samples.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "replay" and rest:
            return Replayed(_lengths_of(Path(rest), option))
        if kind == "lognormal":
            median, sigma, largest = rest.split(":")
            lengths = LogNormal(float(median), float(sigma), int(largest))
            if lengths.median > 0 and lengths.sigma >= 0 and lengths.largest > 0:
                return lengths
        elif int(text) > 0:
            return Fixed(int(text))
    except ValueError:
        pass
    raise ConfigError(f"{option}: found {text!r}, expected {FORMS}")


def _lengths_of(run: Path, option: str) -> tuple[int, ...]:
    import pyarrow.parquet as parquet

    files = sorted((run / "samples").glob("*.parquet"))
    if not files:
        raise ConfigError(f"{option}: {run} holds no samples; name the directory of a PPO run")
    return tuple(
        length for file in files for length in parquet.read_table(file, columns=["length"])["length"].to_pylist()
    )


@dataclass(frozen=True)
class Workload:
    """Requests of one measurement.

    Attributes:
        prompts: token ids of each prompt.
        samples: responses to each.
        lengths: tokens of each response, those of the first prompt first.
    """

    prompts: list[list[int]]
    samples: int
    lengths: list[int]

    @property
    def generated_tokens(self) -> int:
        """Of all responses."""
        return sum(self.lengths)

    @property
    def total_tokens(self) -> int:
        """Of all responses, each with its prompt."""
        return self.generated_tokens + self.samples * sum(map(len, self.prompts))

    def part(self, index: int, parts: int) -> "Workload":
        """Every `parts`-th prompt, as the engines share them."""
        chosen = range(index, len(self.prompts), parts)
        lengths = [self.lengths[p * self.samples + s] for p in chosen for s in range(self.samples)]
        return Workload([self.prompts[p] for p in chosen], self.samples, lengths)


def make_workload(
    prompt: Lengths, response: Lengths, num_prompts: int, samples: int, vocabulary: int, seed: int
) -> Workload:
    """A workload from a seed: others have other prompts, so that no prefix cache knows them, and the same lengths.

    Args:
        prompt: lengths of prompts.
        response: lengths of responses.
        num_prompts: how many prompts.
        samples: responses to each.
        vocabulary: token ids are below.
        seed: of the prompts' tokens.
    """
    sizes = np.random.default_rng(0)
    tokens = np.random.default_rng([1, seed])
    prompts = [
        tokens.integers(min(FIRST_ID, vocabulary - 1), vocabulary, length).tolist()
        for length in prompt.draw(num_prompts, sizes)
    ]
    return Workload(prompts, samples, response.draw(num_prompts * samples, sizes))


def describe(lengths: Lengths) -> str:
    """A few words for tables."""
    match lengths:
        case Fixed(largest):
            return str(largest)
        case LogNormal(median, sigma, largest):
            return f"lognormal {median:g}, {sigma:g}, at most {largest}"
        case _:
            return f"replayed, at most {lengths.largest}"
