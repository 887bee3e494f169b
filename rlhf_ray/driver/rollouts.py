"""Sampling and scoring, as many iterations ahead of training as `ppo.max_staleness` allows.

The bound holds by admission: while iteration i is under way, the engines serve weights of at least as many updates as
i trains on top of, and no batch after i + max_staleness is started. So no token of batch b is from weights more than
max_staleness updates older than those that b trains, however long its responses take.

Where prompts are set aside (`ppo.spare_prompts`), one takes the place of each response that a reward function failed
on. Which one depends on the seed, the iteration and how many failed alone: the numbers do not hang on the clock.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.data import EpochOrder
from rlhf_ray.data.formats import Prompt
from rlhf_ray.driver.groups import Groups
from rlhf_ray.driver.ledger import Ledger, LedgerBatch
from rlhf_ray.errors import DataError, EngineError
from rlhf_ray.rollout.engine import SampleRequest
from rlhf_ray.rollout.pool import sampling_seed
from rlhf_ray.scoring.scorer import ScoredTrajectory
from rlhf_ray.tracking.activity import Activity
from rlhf_ray.trajectory import Trajectory

MEANWHILE_EVERY_S = 0.5
SPARE = "~"  # between the uid of a prompt that was set aside and the number of its turn in an iteration


@dataclass
class Batch:
    """One iteration's scored responses.

    Attributes:
        order: the data order's state after its prompts were drawn, where a run that continues goes on.
        epoch: epochs drawn by then.
        generate_s: seconds from its start to the last response; of each round, where some were sampled for others.
        score_s: seconds from there until all were scored, likewise.
    """

    iteration: int
    scored: list[ScoredTrajectory]
    order: dict[str, Any]
    epoch: float
    generate_s: float
    score_s: float

    def staleness(self, version: int, bound: int) -> dict[str, float]:
        """How many policy updates lie between the weights that sampled a token and those it trains.

        Args:
            version: updates in the weights before this batch's update.
            bound: `ppo.max_staleness`.

        Returns:
            Metrics: mean over tokens, and the largest.

        Raises:
            EngineError: a token is older than the bound or newer than the weights, which admission rules out: better to
                stop than to train on it.
        """
        spans = [span for one in self.scored for span in one.trajectory.versions]
        oldest = version - min(span.version for span in spans)
        newest = max(span.version for span in spans)
        if oldest > bound or newest > version:
            raise EngineError(
                f"iteration {self.iteration}: tokens are from weights of versions {version - oldest} to {newest}, and "
                f"version {version} is trained with `ppo.max_staleness` {bound}; the run stops before that. Please "
                "report this: admission should rule it out"
            )
        tokens = sum(span.end - span.start for span in spans)
        late = sum((version - span.version) * (span.end - span.start) for span in spans)
        return {"sampling/staleness/mean": late / max(tokens, 1), "sampling/staleness/max": float(oldest)}


@dataclass(frozen=True)
class _Draw:
    """What is to be sampled for one iteration: a request a sample, the prompt of each uid; and as in `Batch`."""

    drawn: LedgerBatch
    requests: list[SampleRequest]
    prompts: dict[str, Prompt]
    order: dict[str, Any]
    epoch: float


class Rollouts:
    """The batches of a run, in order."""

    def __init__(
        self,
        config: PPOConfig,
        groups: Groups,
        prompts: list[Prompt],
        spares: Sequence[Prompt],
        ledger: Ledger,
        activity: Activity,
    ) -> None:
        self.order = EpochOrder(len(prompts), config.run.seed)
        self._config = config
        self._groups = groups
        self._prompts = prompts
        self._spares = spares
        self._ledger = ledger
        self._activity = activity
        self._ahead: dict[int, Future[Batch]] = {}
        self._threads = ThreadPoolExecutor(config.ppo.max_staleness + 1, thread_name_prefix="rollouts")

    def close(self) -> None:
        """Start nothing more. Batches under way end with the engines."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def admit(self, iteration: int) -> None:
        """Start the batches that may be under way while `iteration` is, whose weights the engines serve already."""
        ppo = self._config.ppo
        if not ppo.max_staleness:
            return
        for coming in range(iteration, min(iteration + ppo.max_staleness + 1, ppo.iterations)):
            if coming not in self._ahead:
                self._ahead[coming] = self._threads.submit(self._make, self._draw(coming))

    def take(self, iteration: int, meanwhile: Callable[[], None]) -> Batch:
        """Wait for the batch of an iteration; its predecessors were taken before.

        Args:
            iteration: which.
            meanwhile: called again and again in between; what it raises ends the wait.
        """
        self.admit(iteration)
        if iteration not in self._ahead:
            self._ahead[iteration] = self._threads.submit(self._make, self._draw(iteration))
        batch = self._ahead.pop(iteration)
        while not wait([batch], MEANWHILE_EVERY_S).done:  # every wait in that thread has a deadline of its own
            meanwhile()
        return batch.result()

    def _draw(self, iteration: int) -> _Draw:
        prompts = [self._prompts[i] for i in self.order.next(self._config.ppo.prompts_per_iteration)]
        requests, by_uid = self.requests(iteration, prompts)
        drawn = self._ledger.draw(iteration, [(one.uid, one.sample) for one in requests])
        epoch = self.order.epoch + self.order.position / len(self._prompts)
        return _Draw(drawn, requests, by_uid, self.order.state_dict(), epoch)

    def _make(self, draw: _Draw) -> Batch:
        """Sample and score: reference, rewards and critic work while other responses are still being sampled."""
        started = time.monotonic()
        drawn, iteration = draw.drawn, draw.drawn.iteration
        generate_s = 0.0

        def stream(requests: list[SampleRequest]) -> Iterator[list[Trajectory]]:
            nonlocal generate_s
            begun = time.monotonic()
            with self._activity.busy("generate", iteration=iteration):
                self._ledger.dispatch(drawn)
                for finished in self._groups.rollout.generate(requests):
                    self._ledger.complete(drawn, [(one.uid, one.sample) for one in finished])
                    yield finished
            generate_s += time.monotonic() - begun

        # Responses that wait for their turn to train get the values of the critic of that time.
        with_values = self._config.ppo.max_staleness == 0
        requests, prompts = draw.requests, draw.prompts
        scored: list[ScoredTrajectory] = []
        while requests:
            found = self._groups.scorer.score(stream(requests), prompts, with_values=with_values)
            self._ledger.score(drawn, [(one.trajectory.uid, one.trajectory.sample) for one in found])
            scored += found
            self._groups.scorer.check_shares(scored)
            requests, prompts = self._spare_requests(iteration, scored)
            self._ledger.replace(drawn, [(one.uid, one.sample) for one in requests])
        score_s = time.monotonic() - started - generate_s
        return Batch(iteration, scored, draw.order, draw.epoch, generate_s, score_s)

    def _spare_requests(
        self, iteration: int, scored: list[ScoredTrajectory]
    ) -> tuple[list[SampleRequest], dict[str, Prompt]]:
        """What is to be sampled for responses without a score that nothing has taken the place of; as `requests`."""
        taken = sum(is_spare(one.trajectory.uid) for one in scored)
        failed = min(sum(one.problem is not None for one in scored), len(self._spares))
        if taken == failed:
            return [], {}
        order = EpochOrder(len(self._spares), sampling_seed(self._config.run.seed, iteration, "spares", 0))
        turns = list(enumerate(order.next(failed)))[taken:]
        by_uid = {f"{self._spares[index].uid}{SPARE}{turn}": self._spares[index] for turn, index in turns}
        return [self._request(iteration, uid, prompt, 0) for uid, prompt in by_uid.items()], by_uid

    def requests(self, iteration: int, prompts: list[Prompt]) -> tuple[list[SampleRequest], dict[str, Prompt]]:
        """What to sample, and the prompt of each uid."""
        samples = range(self._config.rollout.samples_per_prompt)
        # A prompt may come twice in one iteration, where an epoch ends within it; each draw is a sample of its own.
        by_uid: dict[str, Prompt] = {}
        requests = []
        for prompt in prompts:
            uid = prompt.uid if prompt.uid not in by_uid else f"{prompt.uid}+{len(by_uid)}"
            by_uid[uid] = prompt
            requests += [self._request(iteration, uid, prompt, sample) for sample in samples]
        return requests, by_uid

    def _request(self, iteration: int, uid: str, prompt: Prompt, sample: int) -> SampleRequest:
        rollout = self._config.rollout
        seed = sampling_seed(self._config.run.seed, iteration, uid, sample)
        return SampleRequest(uid, sample, prompt.token_ids, seed, rollout.temperature, rollout.max_new_tokens)


def set_aside(prompts: list[Prompt], count: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts of the epochs, in their order, and `count` others, chosen by the seed.

    Raises:
        DataError: too few are left.
    """
    if not count:
        return prompts, []
    if count >= len(prompts):
        raise DataError(
            f"`ppo.spare_prompts` is {count}, and there are {len(prompts)} prompts, so that none is left to train on: "
            "lower it, or give more prompts"
        )
    chosen = EpochOrder(len(prompts), sampling_seed(seed, 0, "set aside", 0)).next(count)
    left = set(range(len(prompts))).difference(chosen)
    return [prompts[index] for index in sorted(left)], [prompts[index] for index in chosen]


def is_spare(uid: str) -> bool:
    """Whether a response is to a prompt that was set aside."""
    return SPARE in uid
