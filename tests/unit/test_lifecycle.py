"""Which way leads from one state of a process to another."""

from itertools import product

import pytest

from rlhf_ray.runtime.lifecycle import Event, Life, State

FROM_DEATH_TO_SERVING = [Event.RESTARTED, Event.UP, Event.TRANSFER, Event.COMMITTED]


def lived(life: Life, *events: Event) -> Life:
    for event in events:
        life = life.after(event)
    return life


SERVING_ENGINE = lived(Life(engine=True), Event.UP, Event.TRANSFER, Event.COMMITTED)


@pytest.mark.parametrize(
    ("engine", "events", "state"),
    [
        (True, [], State.STARTING),
        (True, [Event.UP], State.STALE),
        (True, [Event.UP, Event.TRANSFER], State.STALE),
        (True, [Event.UP, Event.TRANSFER, Event.COMMITTED], State.SERVING),
        (True, [Event.UP, Event.TRANSFER, Event.COMMITTED, Event.TRANSFER], State.STALE),
        # A transfer that broke off begins again.
        (True, [Event.UP, Event.TRANSFER, Event.TRANSFER, Event.COMMITTED], State.SERVING),
        (True, [Event.UP, Event.SILENT], State.SUSPECT),
        (True, [Event.UP, Event.SILENT, Event.HEARD], State.STALE),
        (True, [Event.UP, Event.SILENT, Event.TRANSFER, Event.COMMITTED], State.SUSPECT),
        (True, [Event.UP, Event.SILENT, Event.TRANSFER, Event.COMMITTED, Event.HEARD], State.SERVING),
        (True, [Event.SILENT, Event.DIED], State.DEAD),
        (True, [Event.DIED, Event.DIED, Event.HEARD, Event.SILENT], State.DEAD),
        (True, [Event.UP, Event.RETIRED, Event.DIED], State.RETIRED),
        (False, [Event.LOADED], State.SERVING),
        (False, [Event.LOADED, Event.DIED, Event.RESTARTED], State.STARTING),
        (False, [Event.LOADED, Event.DIED, Event.RESTARTED, Event.LOADED], State.SERVING),
    ],
)
def test_what_happened_decides_the_state(engine: bool, events: list[Event], state: State):
    assert lived(Life(engine), *events).state is state


@pytest.mark.parametrize(
    ("engine", "events", "impossible"),
    [
        (True, [], Event.LOADED),
        (True, [], Event.COMMITTED),
        (True, [Event.UP], Event.COMMITTED),
        (True, [Event.UP], Event.UP),
        (True, [Event.UP, Event.TRANSFER, Event.COMMITTED], Event.COMMITTED),
        (True, [Event.DIED], Event.UP),
        (True, [Event.DIED], Event.COMMITTED),
        (True, [Event.UP], Event.RESTARTED),
        (True, [Event.RETIRED], Event.RESTARTED),
        (False, [], Event.UP),
        (False, [Event.LOADED], Event.TRANSFER),
    ],
)
def test_what_cannot_happen_is_refused(engine: bool, events: list[Event], impossible: Event):
    life = lived(Life(engine), *events)
    with pytest.raises(ValueError, match=f"{impossible.value} cannot happen to"):
        life.after(impossible)


def test_no_way_from_dead_to_serving_but_through_a_start_a_transfer_and_its_commit():
    """Every sequence of up to six events after the death of an engine that served."""
    found = 0
    for events in product(Event, repeat=6):
        life, happened = SERVING_ENGINE.after(Event.DIED), list[Event]()
        for event in events:
            try:
                life = life.after(event)
            except ValueError:
                break
            # What came before a death counts for nothing after it.
            happened = [] if event is Event.DIED else [*happened, event]
            if life.state is State.SERVING:
                found += 1
                needed = iter(happened)
                assert all(step in needed for step in FROM_DEATH_TO_SERVING), happened
                break
    assert found > 100
