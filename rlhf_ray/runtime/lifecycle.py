"""The life of a process of a run, as a pure state machine.

    starting ──up──▶ stale ──committed──▶ serving        engines: their weights come with transfers
        ▲              ▲ └────transfer──────┘│
        │              └──────transfer───────┘
        │   starting ──loaded──▶ serving                 all others: they start with their weights
        │
    restarted ◀── dead ◀──died── any of them             retired: ended because nobody wants it any longer

A process that gives no sign is suspect, whatever it was doing, until it is heard of again or dies. From dead there is
one way to serving: a new start, and, for an engine, a transfer that began after it and was committed.
"""

from dataclasses import dataclass, replace
from enum import StrEnum


class State(StrEnum):
    """What a process is good for now."""

    STARTING = "starting"
    STALE = "stale"
    SERVING = "serving"
    SUSPECT = "suspect"
    DEAD = "dead"
    RETIRED = "retired"


class Event(StrEnum):
    """What was learnt about a process.

    Attributes:
        UP: an engine has started; it has no weights yet.
        LOADED: another process has started, with its weights.
        TRANSFER: a transfer of new weights to it has begun.
        COMMITTED: the transfer is complete, and the probe agreed.
        SILENT: it gives no sign.
        HEARD: it gives signs again.
        DIED: its process ended, or was ended because it gave no sign for too long.
        RESTARTED: a successor is being started.
        RETIRED: it is about to be ended because nobody wants it any longer.
    """

    UP = "up"
    LOADED = "loaded"
    TRANSFER = "transfer"
    COMMITTED = "committed"
    SILENT = "silent"
    HEARD = "heard"
    DIED = "died"
    RESTARTED = "restarted"
    RETIRED = "retired"


@dataclass(frozen=True)
class Life:
    """Where a process stands.

    Attributes:
        engine: whether its weights come with transfers.
        receiving: a transfer has begun and is not committed.
        silent: it gives no sign.
    """

    engine: bool
    _state: State = State.STARTING
    receiving: bool = False
    silent: bool = False

    @property
    def state(self) -> State:
        """Its state; one that gives no sign is suspect."""
        return State.SUSPECT if self.silent else self._state

    @property
    def ended(self) -> bool:
        """Whether there is no process."""
        return self._state in (State.DEAD, State.RETIRED)

    def after(self, event: Event) -> "Life":
        """Its life after an event.

        Raises:
            ValueError: the event cannot happen to a process in this state.
        """
        match event, self._state:
            case Event.RESTARTED, State.DEAD:
                return Life(self.engine)
            case ((Event.DIED | Event.RETIRED | Event.SILENT | Event.HEARD), (State.DEAD | State.RETIRED)):
                return self  # noticed once more, by somebody else
            case Event.DIED, _:
                return Life(self.engine, State.DEAD)
            case Event.RETIRED, _:
                return Life(self.engine, State.RETIRED)
            case ((Event.SILENT | Event.HEARD), _):
                return replace(self, silent=event is Event.SILENT)
            case Event.LOADED, State.STARTING if not self.engine:
                return replace(self, _state=State.SERVING)
            case Event.UP, State.STARTING if self.engine:
                return replace(self, _state=State.STALE)
            case Event.TRANSFER, State.STALE | State.SERVING if self.engine:
                return replace(self, _state=State.STALE, receiving=True)
            case Event.COMMITTED, State.STALE if self.receiving:
                return replace(self, _state=State.SERVING, receiving=False)
        raise ValueError(f"{event.value} cannot happen to {'an engine' if self.engine else 'a process'} {self._state}")
