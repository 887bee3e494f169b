"""The actors that score: reference models, reward models and reward functions."""

import asyncio
import importlib
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from rlhf_ray.errors import ConfigError, DataError, RewardError
from rlhf_ray.models.reading import SequenceScores, TokenLogprobs
from rlhf_ray.packing import PackedBatch, Sequence, pack, partition
from rlhf_ray.runtime.cores import bind_to_cores
from rlhf_ray.tracking.activity import activity
from rlhf_ray.tracking.logs import setup_actor_logging

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSpec:
    """A frozen model for scoring.

    Attributes:
        path: transformers folder or hub name.
        dtype: "fp32" or "bf16".
        token_budget: most tokens of one forward pass.
        compile: whether torch.compile translates its layers.
    """

    path: str
    dtype: str
    token_budget: int
    gpu: bool
    trust_remote_code: bool = False
    compile: bool = False

    @property
    def device(self) -> torch.device:
        """Where it runs; Ray shows each actor its own GPU alone."""
        return torch.device("cuda", 0) if self.gpu else torch.device("cpu")


class ReferenceActor:
    """Log-probabilities of response tokens under the frozen reference policy."""

    def __init__(self, spec: ModelSpec, temperature: float) -> None:
        setup_actor_logging()
        bind_to_cores()
        self._spec = spec
        self._read = TokenLogprobs(temperature)
        self._model: Any = None

    def load(self) -> None:
        """Load the model. Not in the constructor, whose errors Ray would wrap beyond recognition."""
        from rlhf_ray.models.loading import load_causal_lm

        spec = self._spec
        model = load_causal_lm(spec.path, spec.dtype, trust_remote_code=spec.trust_remote_code)
        self._model = _ready(model, spec)

    def score(self, sequences: list[Sequence]) -> list[torch.Tensor]:
        """Log-probability of each target of each sequence, [targets]."""
        with activity().busy("log-probabilities", tokens=sum(map(len, sequences)), responses=len(sequences)):
            return read_all(self._model, sequences, self._read, self._spec)


@dataclass(frozen=True)
class Completion:
    """A response as reward models and functions see it.

    Attributes:
        token_ids: prompt and response, in the policy's tokens.
        prompt: the prompt as the data has it, a string or a list of messages.
        text: the response's text, special tokens left out.
    """

    token_ids: list[int]
    prompt: Any
    text: str


class RewardModelActor:
    """One learned reward model. Reads the policy's tokens if both use the same tokenizer, else the text."""

    def __init__(self, spec: ModelSpec, policy_tokenizer: str, normalize: bool) -> None:
        setup_actor_logging()
        bind_to_cores()
        self._spec = spec
        self._policy_tokenizer = policy_tokenizer
        self._normalize = normalize
        self._model: Any = None

    def load(self) -> None:
        """Load the model, its tokenizer and its score statistics."""
        from rlhf_ray.models.loading import load_scalar, load_tokenizer

        spec = self._spec
        self._tokenizer = load_tokenizer(spec.path, trust_remote_code=spec.trust_remote_code)
        policy = load_tokenizer(self._policy_tokenizer, trust_remote_code=spec.trust_remote_code)
        self._same_tokens = _tokenize_alike(self._tokenizer, policy)
        model = load_scalar(spec.path, spec.dtype, trust_remote_code=spec.trust_remote_code)
        self._model = _ready(model, spec)
        config = self._model.config
        self._mean = float(getattr(config, "score_mean", 0.0)) if self._normalize else 0.0
        self._std = float(getattr(config, "score_std", 1.0)) if self._normalize else 1.0

    def score(self, completions: list[Completion]) -> list[float]:
        """One score a completion, normalised with the model's saved constants if it was asked for.

        Raises:
            RewardError: a score is not finite.
        """
        sequences = [self._sequence(completion) for completion in completions]
        with activity().busy("scores", tokens=sum(map(len, sequences)), responses=len(sequences)):
            raw = read_all(self._model, sequences, SequenceScores(), self._spec)
        scores = [(float(value) - self._mean) / self._std for value in raw]
        broken = [index for index, score in enumerate(scores) if not math.isfinite(score)]
        if broken:
            raise RewardError(
                f"reward model {self._spec.path}: score {scores[broken[0]]} for the reply "
                f"{completions[broken[0]].text[:200]!r} ({len(broken)} of {len(scores)} replies)"
            )
        return scores

    def _sequence(self, completion: Completion) -> Sequence:
        if self._same_tokens:
            ids = completion.token_ids
        else:
            from rlhf_ray.data.chat import encode_examples

            reply: Any = completion.text
            if not isinstance(completion.prompt, str):
                reply = [{"role": "assistant", "content": completion.text}]
            (encoded,) = encode_examples(self._tokenizer, [(completion.prompt, reply)])
            if isinstance(encoded, DataError):
                raise encoded
            ids = encoded.ids
        tokens = torch.tensor(ids)
        return Sequence(tokens, torch.zeros(len(ids), dtype=torch.bool))


def import_function(path: str) -> Callable[..., Any]:
    """The reward function `package.module:function`.

    Raises:
        ConfigError: there is no such module, or no such function in it, or importing it fails.
    """
    module, _, name = path.partition(":")
    try:
        return cast("Callable[..., Any]", getattr(importlib.import_module(module), name))
    except Exception as error:  # a module may raise anything when it is imported
        raise ConfigError(
            f"reward.functions: {path!r} cannot be imported ({type(error).__name__}: {error}). Write "
            "`package.module:function`, and make the module importable where the actors run"
        ) from None


class RewardFunctionActor:
    """One reward function, in a process of its own so that a call that hangs can be ended."""

    def __init__(self, path: str) -> None:
        setup_actor_logging()
        self._path = path
        self._function: Any = None

    def load(self) -> None:
        """Import the function; raises as `import_function`."""
        self._function = import_function(self._path)

    def score(
        self, completions: list[Completion], completion_ids: list[list[int]], columns: dict[str, list[Any]]
    ) -> list[float | None]:
        """Call the function with TRL's keywords; one number a completion, None where it does not apply.

        Raises:
            RewardError: it raised, or returned something that is not one number (or None) a completion.
        """
        conversational = [not isinstance(c.prompt, str) for c in completions]
        arguments = {
            **columns,
            "prompts": [c.prompt for c in completions],
            "completions": [
                [{"role": "assistant", "content": c.text}] if chat else c.text
                for c, chat in zip(completions, conversational, strict=True)
            ],
            "completion_ids": completion_ids,
        }
        try:
            with activity().busy("scores", responses=len(completions)):
                values = self._function(**arguments)
                if inspect.isawaitable(values):
                    values = asyncio.run(_await(values))
        except Exception as error:
            raise RewardError(f"reward function {self._path} raised {type(error).__name__}: {error}") from None
        return self._checked(values, len(completions))

    def _checked(self, values: Any, expected: int) -> list[float | None]:
        try:
            scores = [None if value is None else float(value) for value in values]
        except (TypeError, ValueError):
            raise RewardError(
                f"reward function {self._path} returned {type(values).__name__} {str(values)[:100]!r}; it must return "
                "a list with one number (or None) for each completion"
            ) from None
        if len(scores) != expected:
            raise RewardError(
                f"reward function {self._path} returned {len(scores)} scores for {expected} completions; it must "
                "return one for each"
            )
        return scores


def _ready(model: Any, spec: ModelSpec) -> Any:
    """The model where it is to run, for forward passes."""
    if spec.compile:
        model.compile_layers()
    return model.to(spec.device).eval()


def _tokenize_alike(one: Any, other: Any) -> bool:
    """Whether both tokenizers turn every conversation into the same token ids."""
    same_template = one.chat_template == other.chat_template
    return same_template and one.get_vocab() == other.get_vocab() and type(one) is type(other)


async def _await(value: Any) -> Any:
    return await value


@torch.no_grad()
def read_all(model: torch.nn.Module, sequences: list[Sequence], reader: Any, spec: ModelSpec) -> list[torch.Tensor]:
    """What `reader` reads for each sequence, in packed batches of at most the spec's token budget, on the CPU."""
    outputs: list[torch.Tensor | None] = [None] * len(sequences)
    (batches,) = partition([len(s) for s in sequences], 1, spec.token_budget)
    for indices in batches:
        batch: PackedBatch = pack(sequences, indices).to(spec.device)
        for index, value in zip(indices, reader(model, batch), strict=True):
            outputs[index] = value.cpu()
    return [value for value in outputs if value is not None]
