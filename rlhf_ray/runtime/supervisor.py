"""One watch over all processes of a run: who starts, serves, gives no sign or is dead, and what is done about it.

A call is always under way to every process, which fails as soon as the process ends: a death is noticed within seconds,
whether anything was asked of it or not. A process that is alive writes once a second what it does
(`tracking/activity.py`); one that neither does so nor answers is suspect, and is ended when that goes on for as long as
a quick phase may take (`run.min_timeout_s`). What it writes counts for nothing while it owes an answer and its host
takes no connections: a host may be cut off from the others and not from the folder. So whoever waits for it sees a
death, and there is one way to recover from all three.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import ray
from ray._private.state import actors
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.config.sections import RunSection
from rlhf_ray.errors import ActorDied, EngineError, RlhfError
from rlhf_ray.runtime.budget import RestartBudget
from rlhf_ray.runtime.lifecycle import Event, Life, State
from rlhf_ray.runtime.patience import Patience, patience_of
from rlhf_ray.runtime.reach import unreachable
from rlhf_ray.runtime.remote import facts, get
from rlhf_ray.tracking.activity import NOW, TRACE
from rlhf_ray.tracking.logs import ACTOR
from rlhf_ray.tracking.stall import write_report

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
ASK_EVERY_S = 2.0
SUSPECT_AFTER_S = 5.0
DRIVER = "driver"
GONE_TIMEOUT_S = 10.0

Lost = Callable[[ActorDied], None]


@dataclass
class _Watched:
    """A process under watch.

    Attributes:
        lost: told when it dies, in a thread of its own; None where its death ends the run's wait.
        answer: the call under way to it; None when it has answered the last one.
        asked: when the last call to it began.
        word: what it has written last; the first one seen may be of the process that had its name before.
        heard: when it has written or answered last; None before its first word, which comes with its first work.
        since: when it came into its state.
        address: where it takes connections; None before its first answer.
        cut_off: whether its host took no connection when that was tried last.
    """

    actor: Any
    life: Life
    lost: Lost | None
    answer: Any = None
    asked: float = 0.0
    word: str | None = None
    heard: float | None = None
    since: float = field(default_factory=time.monotonic)
    address: tuple[str, int] | None = None
    cut_off: bool = False


class Supervisor:
    """The deadlines of a run, the liveness of its processes and the budget of their restarts.

    Args:
        run_dir: the run's directory.
        patience: how long answers may take.
    """

    def __init__(self, run_dir: Path, patience: Patience) -> None:
        self.patience = patience
        self.budget = RestartBudget()
        self._run_dir = run_dir
        self._watched: dict[str, _Watched] = {}
        self._lock = threading.RLock()
        self._lost: RlhfError | None = None  # the first death that nobody makes up for
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(GONE_TIMEOUT_S)

    def watch(self, name: str, actor: Any, *, engine: bool = False, lost: Lost | None = None) -> None:
        """Watch a process that was just started, or the successor of one that died.

        Args:
            name: its name in the run.
            actor: its handle.
            engine: whether its weights come with transfers.
            lost: called when it dies, in a thread of its own; None lets `check` raise.
        """
        with self._lock:
            life = Life(engine)
            if name in self._watched and self._watched[name].life.state is State.DEAD:
                life = self._watched[name].life.after(Event.RESTARTED)
            self._watched[name] = _Watched(actor, life, lost, word=self._word(name))

    def note(self, name: str, event: Event) -> None:
        """Something happened to a process that is watched; one that has ended meanwhile stays ended."""
        with self._lock:
            watched = self._watched.get(name)
            if watched is None or watched.life.ended:
                return
            before = watched.life.state
            watched.life = watched.life.after(event)
            if watched.life.state is not before:
                logger.info("%s: %s, was %s for %.1f s", name, watched.life.state, before, self._in_state(watched))
                watched.since = time.monotonic()

    def _in_state(self, watched: _Watched) -> float:
        return time.monotonic() - watched.since

    def retire(self, name: str) -> None:
        """A process is about to be ended because nobody wants it any longer: its death is none."""
        self.note(name, Event.RETIRED)

    def state(self, name: str) -> State | None:
        """The state of a process; None of one that was never watched."""
        with self._lock:
            return self._watched[name].life.state if name in self._watched else None

    def check(self) -> None:
        """For whoever waits for others meanwhile.

        Raises:
            ActorDied: a process died whose death nobody makes up for.
            BudgetExhausted: one dies again and again.
        """
        if self._lost is not None:
            raise self._lost

    def give_up(self, name: str, problem: str) -> None:
        """End a process that has not done what it should for too long: whoever waits for it sees a death."""
        with self._lock:
            one = self._watched[name]
        self._end_hung(name, one, f"{name}: {problem}")

    def kill(self, name: str, actor: Any) -> None:
        """End a process at once, also one that hangs.

        Ray asks the process itself to end, which one that is stopped never does: it gets the signal, too.
        """
        with suppress(RayError):
            ray.kill(actor)
            process, node = _place_of(actor)
            if node == _own_node():
                _signal(process, name)
            elif node:
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                ray.remote(_signal).options(num_cpus=0, scheduling_strategy=there).remote(process, name)

    def end(self, name: str, actor: Any) -> None:
        """As `kill`, and wait until it is gone."""
        self.kill(name, actor)
        with suppress(EngineError):
            get(actor.__ray_ready__.remote(), f"{name}: its end", GONE_TIMEOUT_S)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_EVERY_S):
            try:
                with self._lock:
                    under_watch = {name: one for name, one in self._watched.items() if not one.life.ended}
                self._listen(under_watch)
                self._end_silent(under_watch)
            except (RayError, OSError):  # Ray itself ends; whoever waits for a process learns it
                logger.debug("the supervisor could not look", exc_info=True)
            except Exception:  # one failure must not end the watch
                logger.warning("the supervisor could not look", exc_info=True)

    def _listen(self, under_watch: dict[str, _Watched]) -> None:
        """Take the answers that have come, and the words of those that are too busy to answer."""
        now = time.monotonic()
        for one in under_watch.values():
            if one.answer is None and now - one.asked >= ASK_EVERY_S:
                one.answer, one.asked = one.actor.__ray_ready__.remote(), now
        asked = {one.answer: name for name, one in under_watch.items() if one.answer is not None}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0, fetch_local=False) if asked else ([], [])
        for ref in ready:
            name = asked[ref]
            one = under_watch[name]
            one.answer = None
            try:
                ray.get(ref, timeout=LOOK_EVERY_S)
                one.heard = now if one.heard is not None else None
                one.address = one.address or _address_of(one.actor)
            except RayActorError as error:
                self._died(name, one, f"{name}: the actor died: {facts(error)}")
        self._try_hosts(under_watch, now)
        for name, one in under_watch.items():
            if one.cut_off or (one.answer is None and one.heard is not None):
                continue  # what it writes does not count, or it has just answered
            word = self._word(name)
            if word is not None and word != one.word:
                one.word, one.heard = word, now

    def _try_hosts(self, under_watch: dict[str, _Watched], now: float) -> None:
        """See whether the hosts of those that owe an answer for long, be it because they are busy, take connections."""
        late = [one for one in under_watch.values() if one.answer is not None and now - one.asked > SUSPECT_AFTER_S]
        failed = unreachable({one.address for one in late if one.address is not None})
        for one in under_watch.values():
            one.cut_off = one in late and one.address in failed

    def _end_silent(self, under_watch: dict[str, _Watched]) -> None:
        """Suspect whoever gives no sign, and end who has given none for too long.

        Where the driver's own words do not reach the folder, the folder is to blame.
        """
        now = time.monotonic()
        folder_works = self._folder_works()
        for name, one in under_watch.items():
            if one.heard is None or one.life.ended:
                continue
            silent = now - one.heard
            if silent < SUSPECT_AFTER_S or not folder_works:
                self.note(name, Event.HEARD)
                continue
            self.note(name, Event.SILENT)
            if silent < max(self.patience.floor_s, SUSPECT_AFTER_S):
                continue
            host = "; its host takes no connections" if one.cut_off else ""
            self._end_hung(name, one, f"{name} has given no sign for {silent:.0f} s (run.min_timeout_s){host}")

    def _end_hung(self, name: str, one: _Watched, problem: str) -> None:
        with suppress(OSError):
            problem += f"; it is ended. What every process was doing: {write_report(self._run_dir, problem, hung=name)}"
        self.kill(name, one.actor)
        self._died(name, one, problem)

    def _folder_works(self) -> bool:
        told = self._told(DRIVER)
        return told is not None and time.time() - told["told"] < SUSPECT_AFTER_S

    def _died(self, name: str, one: _Watched, problem: str) -> None:
        with self._lock:
            if one.life.ended or self._watched.get(name) is not one:
                return
            self.note(name, Event.DIED)
            logger.info("%s", problem)
        threading.Thread(target=self._tell, args=(one, ActorDied(problem)), name=f"lost {name}", daemon=True).start()

    def _tell(self, one: _Watched, error: ActorDied) -> None:
        """Have somebody make up for a death; what nobody does, or what keeps them from it, `check` raises."""
        try:
            if one.lost is None:
                raise error
            one.lost(error)
        except RlhfError as problem:
            self._lost = self._lost or problem

    def _word(self, name: str) -> str | None:
        try:
            return (self._run_dir / TRACE / f"{name}{NOW}").read_text(encoding="utf-8")
        except OSError:
            return None

    def _told(self, name: str) -> dict[str, Any] | None:
        """What a process has written last; None where that is nothing."""
        try:
            return json.loads(self._word(name) or "")
        except json.JSONDecodeError:
            return None


def supervisor_of(run: RunSection, logs: Path) -> Supervisor:
    """That of a run, from its configuration and the folder of its logs."""
    return Supervisor(logs.parent, patience_of(run))


def _place_of(actor: Any) -> tuple[int, str]:
    """The number of an actor's process and the identity of its node, as Ray's head knows them; 0 and "" before."""
    about = actors(actor._actor_id.hex())
    return about.get("Pid", 0), about.get("Address", {}).get("NodeID", "")


def _address_of(actor: Any) -> tuple[str, int] | None:
    """Where an actor's process takes connections, as Ray's head knows it; None before."""
    address = actors(actor._actor_id.hex()).get("Address", {})
    return (address["IPAddress"], address["Port"]) if address.get("Port") else None


def _own_node() -> str:
    return ray.get_runtime_context().get_node_id()


def _signal(process: int, name: str) -> None:
    """SIGKILL to a process, if that number is still that process of a run."""
    with suppress(psutil.Error):
        found = psutil.Process(process)
        if found.environ().get(ACTOR) == name:
            found.kill()
