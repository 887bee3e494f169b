"""The driver's side of the rollout engines: sampling requests over all of them, and giving them new weights."""

import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import Any
from weakref import WeakSet

import ray
import torch

from rlhf_ray.errors import ActorDied, EngineError, Stalled
from rlhf_ray.models.reading import TokenLogprobs
from rlhf_ray.packing import Sequence as PackedSequence
from rlhf_ray.placement.groups import Placement
from rlhf_ray.rollout.engine import EngineSpec, RolloutEngine, SampleRequest
from rlhf_ray.runtime.lifecycle import Event
from rlhf_ray.runtime.remote import START_TIMEOUT_S, Answer, free_name, get
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.tracking.status import forget
from rlhf_ray.training.group import TrainerGroup
from rlhf_ray.trajectory import Trajectory

logger = logging.getLogger(__name__)

# Mean absolute difference of the probe's log-probabilities beyond which an engine does not hold the trainer's weights.
# fp32 engines agree to about 1e-6; bf16 rounds each of them by a few hundredths.
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
# Tokens that it need not exceed: every weight but other tokens' embeddings speaks in each of them.
PROBE_TOKENS = 16

# What many engines finish within this many seconds an engine is taken together: a look at them takes the driver a
# fiftieth of that.
GATHER_S = 5e-4

SAMPLING = "rollout engines: the longest wait for a response"


def sampling_seed(run_seed: int, iteration: int, uid: str, sample: int) -> int:
    """The seed of one sample: the same run draws the same response again, whichever engine it lands on."""
    key = f"{run_seed}/{iteration}/{uid}/{sample}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:6], "big")


class RolloutPool:
    """All rollout engines: those that serve, and those that start beside them and join at the next transfer.

    Several threads may sample at a time, while another changes weights or the number of engines: requests under way
    then wait inside their engines, or go to others, and new ones wait until the change is done.
    """

    def __init__(self, spec: EngineSpec, placement: Placement, supervisor: Supervisor) -> None:
        self._spec = spec
        self._placement = placement
        self._supervisor = supervisor
        self._serving: dict[int, Any] = {}
        self._joining: dict[int, tuple[Any, Any]] = {}  # rank -> engine, its answer once it is up
        self._connected: list[Any] = []
        self._under_way: WeakSet[_Stream] = WeakSet()  # those of all threads
        self._changing = threading.RLock()  # who serves, and with which weights
        self._served = threading.Condition(self._changing)  # an engine serves that did not before
        self._stopped = False

    def launch(self) -> None:
        """Start the engines of the plan."""
        self._serving = {rank: self._launch(rank) for rank in range(self._placement.plan.processes("rollout"))}

    def _launch(self, rank: int) -> Any:
        # One slot of concurrency serves a generate call, the rest the transfer and the probe beside it.
        options = self._placement.options("rollout", rank)
        options["name"] = free_name(options["name"])
        others = [self._placement.options("rollout", rank, part) for part in range(1, self._spec.nodes)]
        engine = ray.remote(RolloutEngine).options(**options, max_concurrency=16).remote(self._spec, others)

        def lost(error: ActorDied) -> None:
            with self._changing:
                self._replace(rank, engine, error)

        self._supervisor.watch(_name(rank), engine, engine=True, lost=lost)
        return engine

    @property
    def engines(self) -> list[Any]:
        """The engines that serve, by rank."""
        return [self._serving[rank] for rank in sorted(self._serving)]

    def start(self) -> None:
        """Wait until the engines that were launched are up; one that dies meanwhile joins the others later.

        Raises:
            EngineError: one did not start for another reason.
        """
        for rank, engine in list(self._serving.items()):
            try:
                get(engine.ready.remote(), f"{_name(rank)}: start-up", START_TIMEOUT_S)
                self._supervisor.note(_name(rank), Event.UP)
            except ActorDied as error:
                with self._changing:
                    self._replace(rank, engine, error)

    def resize(self, count: int) -> None:
        """Have `count` engines, between two iterations: others start beside those that serve, or the last ones leave.

        Those that start serve after the next transfer that finds them up (`newcomers_ready`). What leaving ones have
        not answered, the others take over. One that serves stays as long as one that is to stay does not serve yet.
        """
        with self._changing:
            self._resize(count)

    def _resize(self, count: int) -> None:
        missing = sum(rank not in self._serving for rank in range(count))
        stand_ins = sorted(rank for rank in self._serving if rank >= count)[:missing]
        for rank in sorted({*self._serving, *self._joining}, reverse=True):
            if rank >= count and rank not in stand_ins:
                self._end(rank, self._serving.pop(rank, None) or self._joining.pop(rank)[0])
                self._placement.release("rollout", rank)
                forget(self._placement.logs.parent, _name(rank))
                forget(self._placement.logs.parent, f"{_name(rank)}-part-*")
                logger.info("%s left", _name(rank))
        for rank in range(count):
            if rank not in self._serving and rank not in self._joining:
                self._start_beside(rank)

    def _start_beside(self, rank: int) -> None:
        engine = self._launch(rank)
        self._joining[rank] = engine, engine.ready.remote()
        logger.info("rollout-%d starts; it serves after its first transfer", rank)

    def newcomers_ready(self) -> bool:
        """Whether an engine is up that the next transfer would let in."""
        waiting = [up for _, up in self._joining.values()]
        return bool(waiting) and bool(ray.wait(waiting, num_returns=1, timeout=0)[0])

    @property
    def wants_weights(self) -> bool:
        """Whether no engine serves and one is up that would: requests wait for its first transfer."""
        return not self._serving and self.newcomers_ready()

    def _admit(self) -> None:
        """Let in the newcomers that are up; one that failed to start is started again."""
        for rank, (engine, up) in list(self._joining.items()):
            if not ray.wait([up], timeout=0)[0]:
                continue
            try:
                get(up, f"{_name(rank)}: start-up", START_TIMEOUT_S)
            except ActorDied as error:
                self._replace(rank, engine, error)
                continue
            del self._joining[rank]
            if self._placement.doubled("rollout", rank):
                logger.warning("%s got a node that another engine has; it is placed again", _name(rank))
                self._end(rank, engine)
                self._placement.release("rollout", rank)
                self._start_beside(rank)
                continue
            self._supervisor.note(_name(rank), Event.UP)
            self._serving[rank] = engine

    def _await_engine(self) -> None:
        """Wait until an engine is up that could be given weights.

        Raises:
            Stalled: none is within the time that a start may take.
            BudgetExhausted: they fail to start again and again.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        self._admit()
        while not self._serving:
            waiting = [up for _, up in self._joining.values()]
            if not ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))[0]:
                raise Stalled(f"rollout engines: none of {len(waiting)} is up within {START_TIMEOUT_S:g} s")
            self._admit()

    def _replace_dead(self) -> int:
        """Start successors of engines that have died, beside those that live; how many had."""
        asked = [(rank, engine, engine.ready.remote()) for rank, engine in self._serving.items()]
        dead = 0
        for rank, engine, answer in asked:
            try:
                get(answer, f"{_name(rank)}: sign of life", self._supervisor.patience.ceiling_s)
            except ActorDied as error:
                dead += 1
                self._replace(rank, engine, error)
        return dead

    def _replace(self, rank: int, engine: Any, error: ActorDied) -> None:
        """Start a successor of a dead engine, unless another thread has seen the same death before, or it has left.

        Raises:
            BudgetExhausted: engines of this rank die again and again.
        """
        if self._stopped:
            return
        if self._serving.get(rank) is engine:
            del self._serving[rank]
        elif rank in self._joining and self._joining[rank][0] is engine:
            del self._joining[rank]
        else:
            return
        logger.warning("%s", error)
        self._supervisor.note(_name(rank), Event.DIED)
        pause = self._supervisor.budget.spend(_name(rank), error)
        self._supervisor.end(_name(rank), engine)
        time.sleep(pause)
        self._start_beside(rank)

    def connect(self, trainer: TrainerGroup) -> None:
        """Join the weight-transfer group with the trainer's ranks, as far as the engines have changed."""
        if self._connected != self.engines:
            spec = self._spec
            trainer.connect_engines(self.engines, spec.tensor_parallel, spec.dtype, spec.backend).result()
            self._connected = self.engines

    def update_weights(self, trainer: TrainerGroup, version: int, probe_ids: Sequence[int]) -> dict[str, float]:
        """Transfer the trainer's weights to every engine, probe them, and let them serve as `version`.

        Engines that have died are replaced. Where one dies during the transfer, it begins again with those that live:
        none of them serves before all of it reached it.

        Args:
            trainer: the policy's trainer, connected before.
            version: number of policy updates in these weights.
            probe_ids: fixed tokens whose log-probabilities engine and trainer must agree on.

        Returns:
            Metrics: seconds taken, and the largest probe difference.

        Raises:
            EngineError: the transfer failed, or an engine's log-probabilities differ from the trainer's.
            BudgetExhausted: engines die again and again.
        """
        started = time.monotonic()
        with self._changing:
            while True:
                self._admit()
                self._replace_dead()
                self._await_engine()
                try:
                    difference = self._transfer(trainer, version, probe_ids)
                    break
                except EngineError as error:
                    self._connected = []
                    if not self._replace_dead():
                        raise
                    logger.warning("the transfer of version %d begins again: %s", version, error)
            self._served.notify_all()
        return {"time/transfer": time.monotonic() - started, "rollout/probe_difference": difference}

    def _transfer(self, trainer: TrainerGroup, version: int, probe_ids: Sequence[int]) -> float:
        """One transfer to the engines that serve; the largest difference of the probe."""
        self.connect(trainer)
        for rank in self._serving:
            self._supervisor.note(_name(rank), Event.TRANSFER)
        self._on_all("announce", version)
        if self._spec.sleeps:
            self._on_all("wake", "weights")
        connected, self._connected = self._connected, []  # a transfer that fails ends its connections
        ids = torch.tensor(list(probe_ids))
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0] = False
        (reference,) = trainer.send_weights(version, [PackedSequence(ids, mask)], TokenLogprobs()).result()
        self._connected = connected
        if self._spec.sleeps:
            self._on_all("wake", "kv_cache")
        difference = self._probe(reference, version, probe_ids)
        self._on_all("commit")
        for rank in self._serving:
            self._supervisor.note(_name(rank), Event.COMMITTED)
        return difference

    def _probe(self, reference: torch.Tensor, version: int, probe_ids: Sequence[int]) -> float:
        """Compare the log-probabilities of fixed tokens with the trainer's; the largest difference.

        Raises:
            EngineError: an engine's differ too much.
        """
        probes = self._on_all("probe", list(probe_ids))
        worst = 0.0
        for rank, probe in zip(sorted(self._serving), probes, strict=True):
            difference = (torch.tensor(probe) - reference).abs()
            worst = max(worst, float(difference.max()))
            if not float(difference.mean()) <= PROBE_TOLERANCE[self._spec.dtype]:
                raise EngineError(
                    f"{_name(rank)}: after the transfer of version {version} its log-probabilities differ from the "
                    f"trainer's by {float(difference.mean()):.4f} on average (at most "
                    f"{PROBE_TOLERANCE[self._spec.dtype]} allowed); it does not hold the trainer's weights and must "
                    "not serve"
                )
        return worst

    def sleep(self) -> None:
        """Let the engines drop weights and cache, which they get back at the next transfer.

        Those that still start are waited for: their memory is wanted by others now.
        """
        for rank, (engine, up) in self._joining.items():
            with suppress(EngineError):  # one that failed to start is started again at the next transfer
                get(up, f"{_name(rank)}: start-up", START_TIMEOUT_S)
                Answer(engine.sleep.remote(), "rollout engines: sleep", self._supervisor.patience).result()
        self._on_all("sleep")

    def serve_random_weights(self) -> None:
        """Serve the weights that vLLM made up at the start, for measurements without a trainer."""
        self._on_all("serve_random_weights")
        for rank in self._serving:
            self._supervisor.note(_name(rank), Event.TRANSFER)
            self._supervisor.note(_name(rank), Event.COMMITTED)

    def keep_statistics(self, on: bool) -> None:
        """Whether the engines keep statistics from here on; see `RolloutEngine.keep_statistics`."""
        self._on_all("keep_statistics", on)

    def statistics(self) -> list[dict[str, Any]]:
        """`EngineStatistics` of each engine since the last call."""
        return self._on_all("statistics")

    def _on_all(self, method: str, *args: Any) -> list[Any]:
        refs = [getattr(engine, method).remote(*args) for engine in self.engines]
        return Answer(refs, f"rollout engines: {method}", self._supervisor.patience).result()

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[list[Trajectory]]:
        """Sample every request; yields trajectories as they finish.

        Requests of one prompt go to one engine, so that it computes the prompt once: to the one that has the fewest
        tokens to do. Where an engine dies, or gives no response for the run's time limit, the others take over what it
        owed, and a new one starts in its place; where it was the last one, what it owed waits for its successor.

        Raises:
            EngineError: an engine failed in another way.
            Stalled: no engine serves, and none does for as long as a start and a transfer may take.
            BudgetExhausted: engines die again and again.
        """
        with self._changing:
            streams = self._send(requests)
        pending = list(streams)
        longest = 0.0
        while pending:
            together = GATHER_S * len(pending)
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=together, fetch_local=False)
            if not ready:
                longest = max(longest, self._wait(pending, streams))
                continue  # with what others finish right after it
            finished: list[Trajectory] = []
            for stream, answer in self._answers({stream: streams[stream] for stream in ready}).items():
                if isinstance(answer, ActorDied):
                    handed_over = self._hand_over(streams[stream], answer)
                    streams |= handed_over
                    pending += handed_over
                elif answer:
                    for trajectory in answer:
                        del streams[stream].requests[trajectory.uid, trajectory.sample]
                    finished += answer
                    pending.append(stream)
            if finished:
                yield finished
        # Once a call: the first response may take much longer than the next.
        self._supervisor.patience.took(SAMPLING, longest)

    def _wait(self, pending: list[Any], streams: dict[Any, "_Stream"]) -> float:
        """Wait until one of them has something, and end them where none has in time; the seconds that took."""
        asked, limit = time.monotonic(), self._supervisor.patience.limit(SAMPLING)
        if not ray.wait(pending, num_returns=1, timeout=limit, fetch_local=False)[0]:
            for owed in [streams[stream] for stream in pending]:
                self._supervisor.give_up(_name(owed.rank), f"no response finished within {limit:g} s")
        return time.monotonic() - asked

    def _answers(self, ready: dict[Any, "_Stream"]) -> dict[Any, list[Trajectory] | ActorDied]:
        """The next trajectories of each stream, none at its end; or that its engine died, or left with some owed.

        Raises:
            EngineError: an engine failed in another way.
        """
        found: dict[Any, list[Trajectory] | ActorDied] = {}
        items, limit = {}, self._supervisor.patience.ceiling_s
        for stream, owed in ready.items():
            try:
                items[stream] = next(stream)
            except StopIteration:
                found[stream] = ActorDied(f"{_name(owed.rank)} left") if owed.requests else []
        try:
            answers = get(list(items.values()), "rollout engines: sampling", limit)
            return found | dict(zip(items, answers, strict=True))
        except EngineError:  # one by one, to see which
            for stream, item in items.items():
                try:
                    found[stream] = get(item, f"{_name(ready[stream].rank)}: sampling", limit)
                except ActorDied as error:
                    found[stream] = error
            return found

    def _send(self, requests: Sequence[SampleRequest]) -> dict[Any, "_Stream"]:
        """Share requests out over the engines that serve: those of a prompt to the one with the fewest tokens to do.

        Raises:
            Stalled: none serves, and none does for as long as a start and a transfer may take.
        """
        limit = START_TIMEOUT_S + self._supervisor.patience.ceiling_s
        if not self._served.wait_for(lambda: self._serving or self._stopped, limit):
            raise Stalled(f"rollout engines: none serves after {limit:g} s")
        if self._stopped:
            raise EngineError("the rollout engines are being stopped")
        of_prompt: dict[str, list[SampleRequest]] = {}
        for request in requests:
            of_prompt.setdefault(request.uid, []).append(request)
        loads = dict.fromkeys(self._serving, 0)
        for owed in self._under_way:
            if owed.rank in loads:
                loads[owed.rank] += _tokens(list(owed.requests.values()))
        least = [(load, rank) for rank, load in sorted(loads.items())]
        heapify(least)
        shares: dict[int, list[SampleRequest]] = {}
        for group in of_prompt.values():
            load, rank = least[0]
            heapreplace(least, (load + _tokens(group), rank))
            shares.setdefault(rank, []).extend(group)
        streams = {}
        for rank, share in sorted(shares.items()):
            engine = self._serving[rank]
            stream = engine.generate.options(num_returns="streaming").remote(share)
            streams[stream] = _Stream(rank, engine, {(request.uid, request.sample): request for request in share})
        self._under_way.update(streams.values())
        return streams

    def _hand_over(self, owed: "_Stream", error: ActorDied) -> dict[Any, "_Stream"]:
        """Send the unfinished requests of an engine that died or left to the others; a dead one's successor starts.

        Raises:
            ActorDied: all engines are being stopped.
            Stalled, BudgetExhausted: as `generate`.
        """
        with self._changing:
            if self._stopped:
                raise error
            self._replace(owed.rank, owed.engine, error)
            requests = list(owed.requests.values())
            owed.requests.clear()
            to = "the other engines" if self._serving else "its successor"
            logger.warning("%d responses of %s go to %s", len(requests), _name(owed.rank), to)
            return self._send(requests)

    def _end(self, rank: int, engine: Any) -> None:
        """End an engine that nobody wants any longer, and wait until it is gone, so that its name is free."""
        self._supervisor.retire(_name(rank))
        ray.wait([engine.close.remote()], timeout=10)
        self._supervisor.end(_name(rank), engine)

    def stop(self) -> None:
        """End the engines and vLLM's own processes; what is sampled still fails."""
        self._stopped = True
        if self._changing.acquire(timeout=1.0):  # else whoever holds it sees them end
            self._served.notify_all()
            self._changing.release()
        engines = self._serving | {rank: engine for rank, (engine, _) in self._joining.items()}
        for rank in engines:
            self._supervisor.retire(_name(rank))
        closing = [engine.close.remote() for engine in self.engines]
        ray.wait(closing, num_returns=len(closing), timeout=10)
        for rank, engine in engines.items():
            self._supervisor.kill(_name(rank), engine)


def _name(rank: int) -> str:
    """An engine's name in the run."""
    return f"rollout-{rank}"


def _tokens(requests: Sequence[SampleRequest]) -> int:
    """The most that an engine has to compute for them."""
    return sum(len(request.prompt_ids) + request.max_new_tokens for request in requests)


@dataclass(eq=False)
class _Stream:
    """A generate call under way: its engine, and the requests that it still owes."""

    rank: int
    engine: Any
    requests: dict[tuple[str, int], SampleRequest]
