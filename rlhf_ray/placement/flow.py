"""How long work takes that waits for other work and shares cores or GPUs with it: a fluid model. Pure.

Each process does its jobs one after the other. Who works at the same place shares it in proportion to what each takes:
three processes of one core each on two cores work at two thirds of their speed.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Places:
    """Cores and GPUs that several processes use.

    Attributes:
        capacity: of each place.
        takes: what each process takes of each place while it works; one without an entry shares with nobody.
    """

    capacity: Mapping[str, float]
    takes: Mapping[str, Mapping[str, float]]

    def speeds(self, working: Iterable[str]) -> dict[str, float]:
        """The part of its speed alone at which each process works, where these work at the same time."""
        working = list(working)
        loads: dict[str, float] = {}
        for process in working:
            for place, amount in self.takes.get(process, {}).items():
                loads[place] = loads.get(place, 0.0) + amount
        parts = {place: min(1.0, self.capacity[place] / load) for place, load in loads.items() if load}
        return {p: min((parts.get(place, 1.0) for place in self.takes.get(p, {})), default=1.0) for p in working}

    def as_one(self, groups: Collection[str]) -> "Places":
        """The same with the processes of each of these groups, `policy-0` and so on, as one, `policy`.

        They all work at the same time, and together take what each of them takes.
        """
        takes: dict[str, dict[str, float]] = {}
        for process, taken in self.takes.items():
            group = process.partition("-")[0]
            merged = takes.setdefault(group if group in groups else process, {})
            for place, amount in taken.items():
                merged[place] = merged.get(place, 0.0) + amount
        return Places(self.capacity, takes)


@dataclass(frozen=True)
class Job:
    """Something that a process does.

    Attributes:
        process: who does it, after all jobs of its that come before this one in the list.
        seconds: that it takes where nobody shares.
        after: index of the job that must be done before, if any.
    """

    process: str
    seconds: float
    after: int | None = None


def ends(jobs: Sequence[Job], places: Places) -> list[float]:
    """When each job is done, in seconds from the beginning."""
    done: list[float | None] = [None] * len(jobs)
    queues: dict[str, deque[int]] = {}
    for index, job in enumerate(jobs):
        queues.setdefault(job.process, deque()).append(index)
    left = [job.seconds for job in jobs]
    now = 0.0
    while queues:
        heads = {process: queue[0] for process, queue in queues.items()}
        working = {p: i for p, i in heads.items() if (after := jobs[i].after) is None or done[after] is not None}
        speeds = places.speeds(working)
        step = min(left[index] / speeds[process] for process, index in working.items())
        now += step
        for process, index in working.items():
            left[index] -= step * speeds[process]
            if left[index] <= 1e-9 * max(jobs[index].seconds, 1e-9):
                done[index] = now
                queues[process].popleft()
                if not queues[process]:
                    del queues[process]
    return [end or 0.0 for end in done]
