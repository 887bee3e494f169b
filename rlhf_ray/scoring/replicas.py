"""The processes of one scoring model: whose turn it is, and another in the place of one that died."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_ray.errors import ActorDied, EngineError, Stalled
from rlhf_ray.runtime.lifecycle import Event, State
from rlhf_ray.runtime.remote import START_TIMEOUT_S, Answer, get
from rlhf_ray.runtime.supervisor import Supervisor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replica:
    """One of them, as it was started: its actor, and the answer that says that its model is loaded."""

    actor: Any
    loaded: Any


class Replicas:
    """Processes with the same frozen model. Each is asked in turn; one that died is started again from its model.

    Args:
        phase: what they do, in words, for deadlines and errors.
        starts: by name in the run, what starts each process.
    """

    def __init__(self, phase: str, starts: dict[str, Callable[[], Any]], supervisor: Supervisor) -> None:
        self._phase = phase
        self._starts = starts
        self._supervisor = supervisor
        self._replacing = threading.RLock()
        self._stopped = False
        self._replicas = {name: self._start(name) for name in starts}

    def _start(self, name: str) -> Replica:
        actor = self._starts[name]()
        replica = Replica(actor, actor.load.remote())

        def lost(error: ActorDied) -> None:
            self.replace(name, replica, error)
            self._loaded(name)

        self._supervisor.watch(name, actor, lost=lost)
        return replica

    def start(self) -> None:
        """Wait until all have loaded their model.

        Raises:
            RlhfError: one cannot load it.
            BudgetExhausted: one dies again and again.
        """
        for name in self._starts:
            self._loaded(name)

    def _loaded(self, name: str) -> Replica:
        """A process once it has loaded its model; where it dies meanwhile, the one after it."""
        while True:
            replica = self._replicas[name]
            try:
                get(replica.loaded, f"{name}: start-up", START_TIMEOUT_S)
            except ActorDied as error:
                self.replace(name, replica, error)
                continue
            with self._replacing:
                if self._replicas[name] is replica and self._supervisor.state(name) is State.STARTING:
                    self._supervisor.note(name, Event.LOADED)
            return replica

    def ask(self, turn: int, *args: Any) -> "Asked":
        """Have the process whose turn it is score something; returns at once."""
        names = list(self._starts)
        name = names[turn % len(names)]
        replica = self._replicas[name]
        return Asked(self, name, args, replica, self._answer(replica, args))

    def ask_again(self, asked: "Asked", error: EngineError) -> "Asked":
        """Have the successor of a process that died, or gave no answer in time, score the same."""
        self.replace(asked.name, asked.replica, error)
        replica = self._loaded(asked.name)
        return Asked(self, asked.name, asked.args, replica, self._answer(replica, asked.args))

    def _answer(self, replica: Replica, args: tuple[Any, ...]) -> Answer:
        return Answer(replica.actor.score.remote(*args), self._phase, self._supervisor.patience)

    def replace(self, name: str, replica: Replica, error: EngineError) -> None:
        """Start a successor, unless somebody has done so already.

        Raises:
            BudgetExhausted: it dies again and again.
            EngineError: all are being stopped.
        """
        with self._replacing:
            if self._stopped:
                raise error
            if self._replicas[name] is not replica:
                return
            logger.warning("%s; it is started again", error)
            self._supervisor.note(name, Event.DIED)
            pause = self._supervisor.budget.spend(name, error)
            self._supervisor.end(name, replica.actor)
            time.sleep(pause)
            self._replicas[name] = self._start(name)

    def stop(self) -> None:
        """End the processes at once."""
        self._stopped = True
        for name, replica in self._replicas.items():
            self._supervisor.retire(name)
            self._supervisor.kill(name, replica.actor)


@dataclass
class Asked:
    """Scores under way, and what was asked for, should their process die."""

    replicas: Replicas
    name: str
    args: tuple[Any, ...]
    replica: Replica
    answer: Answer

    def result(self) -> Any:
        """Wait for the scores, of a successor where it must be.

        Raises:
            BudgetExhausted: the process dies again and again.
            RlhfError: it raised something.
        """
        asked = self
        while True:
            try:
                return asked.answer.result()
            except (ActorDied, Stalled) as error:
                asked = self.replicas.ask_again(asked, error)
