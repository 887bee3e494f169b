"""Which cores of its node a process runs on, where the configuration says so (`placement.cores`)."""

import os
from pathlib import Path

from rlhf_ray.errors import ResourceError

CORES = "RLHF_RAY_CORES"  # in an actor's environment: numbers of cores with commas between them


def cores_environment(cores: list[int]) -> dict[str, str]:
    """Environment variables of an actor that is bound to `cores`; none where the list is empty."""
    return {CORES: ",".join(map(str, cores))} if cores else {}


def bind_to_cores() -> None:
    """Run all threads of this process, and those that it starts from here on, on the cores that it was given.

    Raises:
        ResourceError: the node has not all of them.
    """
    cores = {int(core) for core in os.environ.get(CORES, "").split(",") if core}
    there = os.sched_getaffinity(0)
    if not cores <= there:
        raise ResourceError(f"placement.cores: found {sorted(cores)}, but the node has the cores {sorted(there)}")
    if cores:
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)
