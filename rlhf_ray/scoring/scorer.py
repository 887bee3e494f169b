"""The driver's side of scoring: trajectories go to the reference, the rewards and the critic as they finish."""

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
import torch
from torch import Tensor

from rlhf_ray.config.ppo import PPOConfig, RewardFunctionItem
from rlhf_ray.data.formats import Prompt
from rlhf_ray.errors import ActorDied, BudgetExhausted, EngineError, RewardError, shortened
from rlhf_ray.models.reading import StateValues
from rlhf_ray.names import on_disk
from rlhf_ray.packing import Sequence
from rlhf_ray.placement.groups import Placement
from rlhf_ray.runtime.remote import START_TIMEOUT_S, free_name, get
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.scoring.actors import (
    Completion,
    ModelSpec,
    ReferenceActor,
    RewardFunctionActor,
    RewardModelActor,
)
from rlhf_ray.scoring.replicas import Asked, Replicas
from rlhf_ray.training.group import PendingForward, TrainerGroup
from rlhf_ray.trajectory import Trajectory

logger = logging.getLogger(__name__)

# How many rows of a failed call a message names.
MOST_ROWS = 5


@dataclass
class ScoredTrajectory:
    """A trajectory and everything that was said of it.

    Attributes:
        text: the response decoded, special tokens left out.
        ref_logprobs: of each response token under the reference, [R].
        values: the critic's value of the state before each response token and after the last, [R + 1]; None until they
            are computed.
        rewards: raw score by reward name; None where a function had none to give.
        problem: what a function that had none to give said, or did; None where all gave a score.
    """

    trajectory: Trajectory
    prompt: Prompt
    text: str
    ref_logprobs: Tensor
    values: Tensor | None
    rewards: dict[str, float | None]
    problem: str | None = None


@dataclass
class _Chunk:
    """Trajectories under way through all scorers."""

    trajectories: list[Trajectory]
    texts: list[str]
    reference: Asked
    values: PendingForward | None
    models: dict[str, Asked] = field(default_factory=dict)
    functions: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # name -> actor, its answer


def reward_names(config: PPOConfig) -> dict[str, float]:
    """Name and weight of each reward, models first: `model` or `model_0`..., then the functions' own names."""
    models = config.reward.models
    names = {"model" if len(models) == 1 else f"model_{i}": item.weight for i, item in enumerate(models)}
    for item in config.reward.functions:
        name = item.path.rpartition(":")[2]
        names[name if name not in names else f"{name}_{len(names)}"] = item.weight
    return names


def _model_spec(config: PPOConfig, path: str, gpus: float) -> ModelSpec:
    return ModelSpec(
        on_disk(path),
        config.reference.dtype,
        config.reference.micro_batch_tokens,
        gpu=gpus > 0,
        trust_remote_code=config.policy.trust_remote_code,
        compile=config.training.compile,
    )


class Scorer:
    """Reference and reward actors, and the critic's forward pass, behind one call."""

    def __init__(
        self,
        config: PPOConfig,
        placement: Placement,
        critic: TrainerGroup,
        tokenizer: Any,
        tokenizer_path: str,
        supervisor: Supervisor,
    ) -> None:
        self._config = config
        self._placement = placement
        self._critic = critic
        self._tokenizer = tokenizer
        self._supervisor = supervisor
        self._turn = 0
        self._replacing = threading.Lock()
        reward = config.reward
        spec = _model_spec(config, config.policy.path, config.reference.gpus)
        phase = "reference: log-probabilities"
        self._references = self._replicas("reference", phase, ReferenceActor, spec, config.rollout.temperature)
        names = list(reward_names(config))
        self._models = {}
        for name, item in zip(names, reward.models, strict=False):
            spec = _model_spec(config, item.path, reward.gpus)
            self._models[name] = self._replicas(
                "reward",
                f"reward {name}: scores",
                RewardModelActor,
                spec,
                tokenizer_path,
                reward.normalize == "model",
                among=(name, len(reward.models)),
            )
        self._function_items = dict(zip(names[len(reward.models) :], reward.functions, strict=True))
        self._functions = {name: self._function(name, item) for name, item in self._function_items.items()}
        self._function_loads = {name: actor.load.remote() for name, actor in self._functions.items()}

    def _replicas(self, group: str, phase: str, actor: type, *args: Any, among: tuple[str, int] = ("", 1)) -> Replicas:
        """One actor a process of the group; several reward models share each process's resources.

        Args:
            group: the group.
            phase: what they do, in words.
            actor: their class.
            args: what its constructor takes.
            among: the model's own name, and of how many it is one.
        """
        own, shared = among
        starts: dict[str, Callable[[], Any]] = {}
        for rank in range(len(self._placement.order[group])):
            options = self._placement.options(group, rank)
            if shared > 1:
                options["name"] = f"{group}-{own}-{rank}"
                options["num_cpus"] /= shared
                options["num_gpus"] /= shared
                resources = options["num_cpus"], options["num_gpus"]
                options["runtime_env"] = {"env_vars": self._placement.environment(options["name"], *resources, group)}
            starts[options["name"]] = partial(_start, actor, options, *args)
        return Replicas(phase, starts, self._supervisor)

    def _function(self, name: str, item: RewardFunctionItem) -> Any:
        # Functions are cheap or wait for something else; they run beside the groups and take no share of them.
        actor = f"reward-{name}"
        environment = {"env_vars": self._placement.environment(actor, 1)}
        return _start(RewardFunctionActor, {"name": actor, "num_cpus": 0, "runtime_env": environment}, item.path)

    def start(self) -> None:
        """Wait until every scorer is up."""
        for replicas in (self._references, *self._models.values()):
            replicas.start()
        get(list(self._function_loads.values()), "reward functions: start-up", START_TIMEOUT_S)

    def score(
        self, stream: Iterable[list[Trajectory]], prompts: Mapping[str, Prompt], *, with_values: bool
    ) -> list[ScoredTrajectory]:
        """Score trajectories while others are still being sampled. Several threads may do so at a time.

        Args:
            stream: finished trajectories, in any order.
            prompts: the prompts by uid.
            with_values: whether the critic values them, too. Its ranks must all be asked in one order, so that this is
                for the thread that trains it.

        Returns:
            All of them, in the order of `prompts` and of the sample index, whatever order they arrived in.

        Raises:
            RewardError: a reward model failed.
            BudgetExhausted: a scorer dies, or does not answer in time, again and again.
        """
        chunks: list[_Chunk] = []
        waiting: list[Trajectory] = []
        tokens = 0
        for finished in stream:
            for trajectory in finished:
                waiting.append(trajectory)
                tokens += trajectory.num_tokens
                if tokens >= self._config.reference.micro_batch_tokens:
                    chunks.append(self._dispatch(waiting, prompts, with_values))
                    waiting, tokens = [], 0
        if waiting:
            chunks.append(self._dispatch(waiting, prompts, with_values))
        scored = [one for chunk in chunks for one in self._collect(chunk, prompts)]
        position = {uid: index for index, uid in enumerate(prompts)}
        scored.sort(key=lambda one: (position[one.trajectory.uid], one.trajectory.sample))
        return scored

    def check_shares(self, scored: list[ScoredTrajectory]) -> None:
        """Refuse to train on the rest where a function has failed on too many responses of an iteration.

        Raises:
            BudgetExhausted: it scored a smaller share of them than it must.
        """
        for name, item in self._function_items.items():
            check_share(item, [one.rewards[name] for one in scored])

    def _dispatch(self, trajectories: list[Trajectory], prompts: Mapping[str, Prompt], with_values: bool) -> _Chunk:
        # Within a chunk the order of arrival would decide how sequences are packed together.
        trajectories = sorted(trajectories, key=lambda t: (t.uid, t.sample))
        sequences = [response_sequence(trajectory) for trajectory in trajectories]
        responses = [t.response_ids.tolist() for t in trajectories]
        texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
        completions = [
            Completion(sequence.input_ids.tolist(), prompts[t.uid].content, text)
            for t, sequence, text in zip(trajectories, sequences, texts, strict=True)
        ]
        self._turn += 1
        shared_completions = ray.put(completions)
        chunk = _Chunk(
            trajectories,
            texts,
            reference=self._references.ask(self._turn, sequences),
            values=self._critic.forward(sequences, StateValues()) if with_values else None,
        )
        for name, replicas in self._models.items():
            chunk.models[name] = replicas.ask(self._turn, shared_completions)
        if self._functions:
            rows = [prompts[t.uid].row for t in trajectories]
            columns = {name: [row.get(name) for row in rows] for name in {n for row in rows for n in row}}
            for name, actor in self._functions.items():
                chunk.functions[name] = (actor, actor.score.remote(shared_completions, responses, columns))
        return chunk

    def _collect(self, chunk: _Chunk, prompts: Mapping[str, Prompt]) -> list[ScoredTrajectory]:
        reference = chunk.reference.result()
        values = chunk.values.result() if chunk.values else None
        rewards: dict[str, list[float | None]] = {name: answer.result() for name, answer in chunk.models.items()}
        problems: list[str | None] = [None] * len(chunk.trajectories)
        for name in chunk.functions:
            rewards[name], problem = self._function_scores(name, chunk, prompts)
            problems = [problem if _lacks(score) else old for old, score in zip(problems, rewards[name], strict=True)]
        return [
            ScoredTrajectory(
                trajectory,
                prompts[trajectory.uid],
                text,
                reference[i],
                values[i] if values else None,
                {name: scores[i] for name, scores in rewards.items()},
                problems[i],
            )
            for i, (trajectory, text) in enumerate(zip(chunk.trajectories, chunk.texts, strict=True))
        ]

    def _function_scores(
        self, name: str, chunk: _Chunk, prompts: Mapping[str, Prompt]
    ) -> tuple[list[float | None], str | None]:
        """A function's scores of a chunk, and why some are missing, which is logged with their rows."""
        item = self._function_items[name]
        actor, ref = chunk.functions[name]
        scores: list[float | None] = [None] * len(chunk.trajectories)
        try:
            # One that replaced another may still be starting, which is no fault of the function.
            get(self._function_loads[name], f"reward function {item.path}: start-up", START_TIMEOUT_S)
            scores = get(ref, f"reward function {item.path}", item.timeout_s)
            problem = None
        except RewardError as error:
            problem = str(error)
        except ActorDied as error:
            problem = f"{error}. A reward function must not end its process"
            self._replace_function(name, actor)
        except EngineError:
            problem = f"reward function {item.path} gave no answer within {item.timeout_s:g} s (`timeout_s`)"
            self._replace_function(name, actor)
        left_out = [one for one, score in zip(chunk.trajectories, scores, strict=True) if _lacks(score)]
        if not left_out:
            return scores, None
        if problem is None:
            problem = (
                f"reward function {item.path} gave no finite score (None, NaN or infinite) for {len(left_out)} of "
                f"{len(scores)} replies"
            )
        rows = "; ".join(_row(one, prompts[one.uid]) for one in left_out[:MOST_ROWS])
        more = f"; and {len(left_out) - MOST_ROWS} more" if len(left_out) > MOST_ROWS else ""
        if item.min_scored == 1:
            raise BudgetExhausted(
                f"{problem}. Mend the function, or set its `min_scored` below 1 to leave such samples out. They are: "
                f"{rows}{more}"
            )
        logger.warning("%s; left out of training: %s%s", problem, rows, more)
        return scores, problem

    def _replace_function(self, name: str, actor: Any) -> None:
        """A new process for a function. Calls queued behind the one that failed die with it and are treated alike."""
        with self._replacing:
            if self._functions[name] is not actor:
                return
            self._supervisor.end(f"reward-{name}", actor)
            self._functions[name] = self._function(name, self._function_items[name])
            self._function_loads[name] = self._functions[name].load.remote()

    def stop(self) -> None:
        """End the actors at once."""
        for replicas in (self._references, *self._models.values()):
            replicas.stop()
        for name, actor in self._functions.items():
            self._supervisor.kill(f"reward-{name}", actor)


def check_share(item: RewardFunctionItem, scores: list[float | None]) -> None:
    """As `Scorer.check_shares`, of one function's scores."""
    given = sum(not _lacks(score) for score in scores)
    if given < item.min_scored * len(scores):
        raise BudgetExhausted(
            f"reward function {item.path} scored {given} of the iteration's {len(scores)} responses, and its "
            f"`min_scored` is {item.min_scored:g}: mend the function (the log names the rows), or lower the share"
        )


def _lacks(score: float | None) -> bool:
    return score is None or not math.isfinite(score)


def _row(trajectory: Trajectory, prompt: Prompt) -> str:
    """The row of a response for a message: where it is from, the sample, and how its prompt starts."""
    content = prompt.content if isinstance(prompt.content, str) else prompt.content[-1]["content"]
    return f"{prompt.source} (sample {trajectory.uid}/{trajectory.sample}, {shortened(content, 60)!r})"


def _start(actor: type, options: dict[str, Any], *args: Any) -> Any:
    """An actor with such options, under its name or one that is free."""
    return ray.remote(actor).options(**options | {"name": free_name(options["name"])}).remote(*args)


def response_sequence(trajectory: Trajectory) -> Sequence:
    """Prompt and response as one sequence whose targets are the response tokens."""
    ids = torch.from_numpy(trajectory.token_ids)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[len(trajectory.prompt_ids) :] = True
    return Sequence(ids, mask)
