"""The PPO loop (Schulman et al., arXiv:1707.06347, as applied to language models in arXiv:2203.02155).

One iteration, top to bottom: draw prompts, sample responses, score them as they finish (`rollouts.py`), compute
advantages, update policy and critic side by side, hand the new weights to the engines. With `ppo.max_staleness` the
engines meanwhile sample for the next iterations, and go on with new weights in the middle of a response. What differs
from the papers: reward, KL and value live on tokens; losses are means over all response tokens of an optimizer step,
not over responses; a response cut at its limit is bootstrapped with the critic's value instead of ending there.
"""

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.algorithms.kl import AdaptiveKL, FixedKL, KLController
from rlhf_ray.algorithms.mismatch import logprob_mismatch
from rlhf_ray.algorithms.rewards import RunningNormalizer
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.data import EpochOrder
from rlhf_ray.data.formats import Prompt
from rlhf_ray.driver.control import wanted_engines
from rlhf_ray.driver.experience import Experience, build_experience
from rlhf_ray.driver.groups import Groups
from rlhf_ray.driver.health import UpdateHealth, mismatch_alarm
from rlhf_ray.driver.ledger import Ledger
from rlhf_ray.driver.rollouts import Batch, Rollouts
from rlhf_ray.errors import BudgetExhausted
from rlhf_ray.models.reading import StateValues, TokenLogprobs
from rlhf_ray.packing import Sequence
from rlhf_ray.rollout.pool import PROBE_TOKENS, sampling_seed
from rlhf_ray.scoring.scorer import ScoredTrajectory, response_sequence
from rlhf_ray.stages.run import Run
from rlhf_ray.tracking.activity import Activity
from rlhf_ray.training.group import PendingSave
from rlhf_ray.training.objectives import PolicyUpdate, ValueUpdate

logger = logging.getLogger(__name__)


class PPOLoop:
    """One PPO run over running groups."""

    def __init__(
        self,
        config: PPOConfig,
        run: Run,
        groups: Groups,
        prompts: list[Prompt],
        ptx: list[Sequence],
        spares: Items[Prompt] = (),
    ) -> None:
        self.config = config
        self.run = run
        self.groups = groups
        self.ptx = ptx
        ppo = config.ppo
        self.ptx_order = EpochOrder(len(ptx), config.run.seed) if ptx else None
        self.kl: KLController = (
            AdaptiveKL(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon) if ppo.kl_target else FixedKL(ppo.kl_coef)
        )
        self.normalizer = RunningNormalizer()
        self.policy_health = UpdateHealth(run.directory.path, "policy")
        self.critic_health = UpdateHealth(run.directory.path, "critic")
        self.version = 0  # policy updates so far: one an iteration
        self.probe_ids = max((p.token_ids for p in prompts[:16]), key=len)[:PROBE_TOKENS]
        self.timings: dict[str, float] = {}
        self.stalled_s = 0.0  # by the checkpoint before this iteration
        # The last iteration that is whole, as `Run.checkpoint_if_due` takes it.
        self.done: tuple[int, dict[str, Any], Callable[[Path], list[PendingSave]], float] | None = None
        self.activity = Activity("driver", run.directory.path)
        self.ledger = Ledger(run.directory.ledger, ppo.max_staleness)
        self.rollouts = Rollouts(config, groups, prompts, spares, self.ledger, self.activity)
        self.iteration = 0

    def train(self) -> None:
        """Run the iterations that are left."""
        with closing(self.activity), closing(self.rollouts), closing(self.ledger), self.run.saving():
            self._train()

    def _train(self) -> None:
        self.groups.turns.to_trainers()
        self._restore()
        self.ledger.start(self.run.start_step)
        self.groups.turns.to_engines()
        self._transfer()
        for iteration in self.run.begin(self.config.ppo.iterations, ["objective/scores", "objective/kl"]):
            self.iterate(iteration)

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration, from prompts to engines that serve the new weights; returns its metrics."""
        self.timings, self.iteration = {}, iteration
        with self._timed("iteration"):
            batch = self._take(iteration)
            staleness = batch.staleness(self.version, self.config.ppo.max_staleness)
            self.groups.turns.to_trainers()
            with self._timed("advantages"):
                experience = self._experience(batch.scored)
            with self._timed("train"), self.ledger.training(iteration, experience.samples):
                metrics = self._update(iteration, experience)
            self.groups.turns.to_engines()
            if self._trains_policy(iteration):
                self.version += 1
            if self._trains_policy(iteration) or self.groups.turns.taken:  # engines that slept have no weights
                metrics |= self._transfer()
            self.rollouts.admit(iteration + 1)
        metrics |= experience.metrics | staleness | self._state_metrics(batch)
        if not self.config.ppo.max_staleness and "sampling/kl" in metrics:  # of the weights that sampled
            metrics |= mismatch_alarm(metrics, {self.config.rollout.dtype, self.config.training.dtype})
        self.kl.update(experience.kl, len(experience.policy))
        self.activity.count_iteration()
        self.groups.supervisor.budget.renew()
        self.run.log(iteration, metrics, experience.samples)
        started = time.monotonic()
        self.done = iteration, self._state(batch), self._save, metrics["objective/scores"]
        self.run.checkpoint_if_due(*self.done)
        self.stalled_s = time.monotonic() - started
        return metrics

    def _take(self, iteration: int) -> Batch:
        """Have the engines that are asked for, and their batch; what is trained is saved if there will be none."""
        try:
            self._resize()
            with self._timed("wait"):
                return self.rollouts.take(iteration, meanwhile=self._tend)
        except BudgetExhausted:
            if self.done is not None:
                self.run.checkpoint_at_the_end(*self.done)
            raise

    def _resize(self) -> None:
        """Have as many engines as were asked for; those that are up by now take the current weights and serve."""
        rollout = self.groups.rollout
        rollout.resize(wanted_engines(self.run.directory.path) or self.config.rollout.engines)
        if rollout.newcomers_ready():
            self._transfer()

    def _tend(self) -> None:
        """While responses are waited for: weights for an engine that starts where none serves.

        Raises:
            ActorDied: a trainer died; whatever is sampled and scored would be thrown away.
            BudgetExhausted: a process dies again and again.
        """
        self.groups.supervisor.check()
        if self.groups.rollout.wants_weights:
            self._transfer()

    def _transfer(self) -> dict[str, float]:
        """The policy's weights to all engines; returns its metrics."""
        with self.activity.busy("transfer", iteration=self.iteration):
            return self.groups.rollout.update_weights(self.groups.policy, self.version, self.probe_ids)

    def _experience(self, scored: list[ScoredTrajectory]) -> Experience:
        """Advantages and returns. Old log-probabilities are computed only where several updates make them differ."""
        logprobs = None
        sequences = [response_sequence(one.trajectory) for one in scored]
        if any(one.values is None for one in scored):
            values = self.groups.critic.forward(sequences, StateValues())
        if not self._one_step:
            logprobs = self.groups.policy.forward(sequences, TokenLogprobs(self.config.rollout.temperature)).result()
        if any(one.values is None for one in scored):
            for one, of_states in zip(scored, values.result(), strict=True):
                one.values = of_states
        experience = build_experience(scored, logprobs, self.config, self.kl.coef, self.normalizer)
        if logprobs is not None:
            engine = torch.cat([torch.tensor(one.trajectory.logprobs) for one in scored])
            experience.metrics.update(logprob_mismatch(engine, torch.cat(logprobs)))
        return experience

    @property
    def _one_step(self) -> bool:
        """Whether each response is trained on in one optimizer step alone, which so sees the policy before it."""
        return self.config.ppo.epochs == 1 and self.config.ppo.minibatches == 1

    def _trains_policy(self, iteration: int) -> bool:
        return iteration >= self.config.critic.warmup_iterations

    def _update(self, iteration: int, experience: Experience) -> dict[str, float]:
        """Several epochs of minibatches, policy and critic at the same time."""
        ppo = self.config.ppo
        in_loss = ppo.kl_placement == "loss"
        policy_objective = PolicyUpdate(
            ppo.clip_range,
            self.config.rollout.temperature,
            self._one_step,
            ppo.entropy_coef,
            self.kl.coef if in_loss else 0.0,
            ppo.kl_estimator if in_loss else None,
            ppo.ptx_coef,
            ppo.importance_cap if ppo.max_staleness else None,
        )
        value_objective = ValueUpdate(ppo.clip_range_value)
        steps: list[dict[str, float]] = []
        for indices in self._minibatches(iteration, len(experience.policy)):
            states = [experience.critic[i] for i in indices]
            critic = self.groups.critic.step(states, value_objective)
            metrics: dict[str, float] = {}
            if self._trains_policy(iteration):
                batch = [experience.policy[i] for i in indices] + self._ptx_batch(len(indices))
                of_policy = self.groups.policy.step(batch, policy_objective).result()
                self.policy_health.check(iteration, of_policy, batch, policy_objective, None)
                metrics |= _named(of_policy, "policy")
            of_critic = critic.result()
            self.critic_health.check(iteration, of_critic, states, value_objective, None)
            metrics |= _named(of_critic, "critic")
            steps.append(metrics)
        return _over_updates(steps)

    def _minibatches(self, iteration: int, count: int) -> Iterator[list[int]]:
        """Index lists of one iteration: a new seeded order each epoch, cut into equal parts."""
        ppo = self.config.ppo
        for epoch in range(ppo.epochs):
            generator = torch.Generator().manual_seed(
                sampling_seed(self.config.run.seed, iteration, "minibatches", epoch)
            )
            order = torch.randperm(count, generator=generator)
            yield from (part.tolist() for part in order.tensor_split(ppo.minibatches) if len(part))

    def _ptx_batch(self, count: int) -> list[Sequence]:
        """As many demonstrations as responses, for the pretraining mix."""
        if self.ptx_order is None:
            return []
        return [self.ptx[i] for i in self.ptx_order.next(count)]

    def _state_metrics(self, batch: Batch) -> dict[str, float]:
        tokens = sum(len(one.trajectory.response_ids) for one in batch.scored)
        timings = self.timings | {"generate": batch.generate_s, "score": batch.score_s, "checkpoint": self.stalled_s}
        metrics = {f"time/{name}": seconds for name, seconds in timings.items()}
        return metrics | {
            "objective/kl_coef": self.kl.coef,
            "rollout/tokens_per_second": tokens / batch.generate_s,
            "rollout/engines": float(len(self.groups.rollout.engines)),
            "rollout/weight_version": batch.scored[0].trajectory.versions[0].version,
            "data/epoch": batch.epoch,
        }

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        with self.activity.busy(name, iteration=self.iteration):
            yield
        self.timings[name] = time.monotonic() - started

    def _state(self, batch: Batch) -> dict[str, Any]:
        """What the next iteration goes on from; batches that were begun ahead are drawn and sampled again."""
        return {
            "order": batch.order,
            "ptx_order": self.ptx_order.state_dict() if self.ptx_order else None,
            "kl": self.kl.state_dict(),
            "normalizer": self.normalizer.state_dict(),
            "version": self.version,
        }

    def _save(self, folder: Path) -> list[PendingSave]:
        return [
            self.groups.policy.save(str(folder / "policy")),
            self.groups.critic.save(str(folder / "critic")),
        ]

    def _restore(self) -> None:
        checkpoint = self.run.checkpoint
        if checkpoint is None:
            return
        loading = [
            self.groups.policy.load(str(checkpoint.folder / "policy")),
            self.groups.critic.load(str(checkpoint.folder / "critic")),
        ]
        for pending in loading:
            pending.result()
        state = checkpoint.state
        with checkpoint.restoring():
            self.rollouts.order.load_state_dict(state["order"])
            if self.ptx_order:
                self.ptx_order.load_state_dict(state["ptx_order"])
            self.kl.load_state_dict(state["kl"])
            self.normalizer.load_state_dict(state["normalizer"])
            self.version = state["version"]


def _named(metrics: dict[str, float], group: str) -> dict[str, float]:
    """A trainer's own metrics under its group's name; those of the objective as they are."""
    own = {"grad_norm": f"grad_norm/{group}", "learning_rate": f"lr/{group}"}
    own |= {name: f"{name}/{group}" for name in ("skipped_updates", "unchanged_updates")}
    return {own.get(name, name): value for name, value in metrics.items() if name != "loss"}


def _over_updates(steps: list[dict[str, float]]) -> dict[str, float]:
    """An iteration's metrics from those of its updates: means, but for what counts updates."""
    metrics = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    for name in metrics:
        if name.startswith("skipped_updates"):
            metrics[name] = sum(step[name] for step in steps)
        elif name.startswith("unchanged_updates"):
            metrics[name] = steps[-1][name]
    return metrics
