"""Connecting to Ray: the cluster that is named, the one this process was started in, or a new one on this machine."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from rlhf_ray.errors import ResourceError
from rlhf_ray.runtime import chaos
from rlhf_ray.runtime.ports import check_port_of_head
from rlhf_ray.runtime.reach import check_reachable, explained

logger = logging.getLogger(__name__)

# Objects here are token ids and per-token floats; a laptop should not lose a third of its memory to the store.
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


@contextmanager
def connection(address: str | None = None, asked: str = "run.ray_address") -> Iterator[None]:
    """Be connected to Ray inside the block; whatever this call started is stopped at its end.

    Args:
        address: a running cluster ("auto" or HEAD:PORT); None takes `RAY_ADDRESS` (set inside a submitted job) or,
            without one, starts Ray on this machine for the length of the block, where no other machine reaches it and
            no other run joins it.
        asked: what gave the address, for errors.

    Raises:
        ResourceError: no cluster answers at the address, it refuses this process, or has other versions; or a new one
            does not start, or the port that it is to have is in use.
    """
    if ray.is_initialized():
        yield
        return
    if not address and os.environ.get("RAY_ADDRESS"):
        address, asked = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
    if not address:
        with own_cluster():
            yield
        return
    _join(address, asked)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def own_cluster(cpus: int | None = None) -> Iterator[None]:
    """Ray on this machine for the length of the block. Nobody reaches it from another one, and no other run joins it.

    Args:
        cpus: the cores that Ray is told of; None tells it of those that there are.

    Raises:
        ResourceError: it does not start, or the port that it is to have is in use.
    """
    check_port_of_head()
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    try:
        # A node that is to have no others is at 127.0.0.1, and its processes listen there alone. Ray does so by itself
        # on macOS; here it is asked to, because what answers at its ports may be made to run code.
        ray_constants.ENABLE_RAY_CLUSTER = False
        ray.init(
            "local",  # a cluster that `ray start` left on this machine would be joined otherwise
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            # Actors have an environment of their own, so that none would be one of the workers (one a core) that
            # Ray starts beforehand.
            _system_config={"prestart_worker_first_driver": False},
        )
    except Exception as error:  # Ray raises nothing more special where a process of its own is too slow
        ray.shutdown()
        raise ResourceError(
            f"Ray could not be started on this machine: {error}. Where other work keeps all cores busy, wait for it "
            "and give the same command again; Ray's own logs are in /tmp/ray/session_latest/logs"
        ) from error
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str, asked: str) -> None:
    check_reachable(address, asked)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RayError, RuntimeError, ValueError) as error:
        ray.shutdown()  # of what was connected before the failure
        raise explained(error, address, asked) from None


def _import_path() -> list[str]:
    """Folders from which the driver imports modules that are not installed, its working directory first.

    Ray's workers know neither; a user's own reward functions lie there.
    """
    installed = (sys.prefix, sys.base_prefix)
    return [os.getcwd(), *(path for path in sys.path if path and not path.startswith(installed))]


# oneDNN keeps the kernels that it made for each shape of a matrix product, 1,024 of them by itself. An engine meets new
# shapes in every iteration, as prompts differ and responses end one by one, and grows by 0.4 MiB for each. With fewer
# it stays as large as it was after some iterations, and takes up to 8 % longer to sample with a tiny model.
ONEDNN_KERNELS = 128

# How glibc keeps memory for the next pass over a model. On its own it gives the large tensors of each pass back to the
# system and takes them again, page by page; several processes that do so at a time wait for each other, which costs a
# tenth of an iteration. A trainer takes up to 6 % more at its peak.
KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the largest that glibc accepts
    "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}


def actor_environment(cpus: float, gpus: float = 0.0) -> dict[str, str]:
    """Environment variables of an actor that may use `cpus` cores, and computes on them where it has no GPU.

    Two processes with more OpenMP threads than their share of the cores slow each other down by an order of
    magnitude, so each gets the threads it was given cores for, and at least one.
    """
    threads = str(max(1, int(cpus)))
    return (
        ({} if gpus else KEPT_MEMORY | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(ONEDNN_KERNELS)})
        | chaos.environment()
        | {
            "PYTHONPATH": os.pathsep.join(_import_path()),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            # vLLM on CPU would otherwise pin every engine to the same first core.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "VLLM_NO_USAGE_STATS": "1",
        }
    )
