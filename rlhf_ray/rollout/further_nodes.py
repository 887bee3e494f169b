"""An engine that is split over nodes: vLLM's workers on every node but its first, each node in an actor of its own.

The engine's actor starts them, so Ray ends them when it ends; and it ends when one of them does, for vLLM would wait
for that node's part of every step.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Any

import ray

from rlhf_ray.runtime.cores import bind_to_cores
from rlhf_ray.runtime.interface import choose_interface
from rlhf_ray.runtime.ports import held_port
from rlhf_ray.runtime.remote import free_name
from rlhf_ray.tracking.activity import activity
from rlhf_ray.tracking.logs import setup_actor_logging

logger = logging.getLogger(__name__)

ANSWER_S = 10.0  # for what an ended node's actor has answered already
HOST_VARIABLE = "VLLM_HOST_IP"  # where vLLM's processes of other nodes reach those of this one
ACTOR_PROCESS = "RLHF_RAY_ENGINE_PROCESS"  # which the processes that vLLM starts on this node end with


class FurtherNodes:
    """The other nodes of one engine; none where it is not split.

    Args:
        args: what vLLM is started with on every node.
        places: Ray's options of an actor on each further node.
    """

    def __init__(self, args: dict[str, Any], places: Sequence[dict[str, Any]]) -> None:
        self._args = args
        self._places = places
        self._actors: list[Any] = []
        self._closing = False

    @contextmanager
    def started(self) -> Iterator[dict[str, Any]]:
        """Start the other nodes' workers, and wait for nothing; yields what vLLM is to be started with on this one.

        The nodes meet at a port of this one, which is held until the block ends.
        """
        os.environ[ACTOR_PROCESS] = str(os.getpid())
        if not self._places:
            yield self._args
            return
        host = ray.util.get_node_ip_address()
        os.environ[HOST_VARIABLE] = host
        with held_port(host) as port:
            args = self._args | {"nnodes": 1 + len(self._places), "master_addr": host, "master_port": port}
            # vLLM's own all-reduce would look for all ranks among the GPUs of this actor, where nodes are one machine.
            args["disable_custom_all_reduce"] = True
            self._actors = [
                ray.remote(NodeOfEngine).options(**place | {"name": free_name(place["name"])}).remote()
                for place in self._places
            ]
            work = [actor.work.remote(args | {"node_rank": 1 + i}) for i, actor in enumerate(self._actors)]
            Thread(target=self._end_with_others, args=(work,), name="end with other nodes", daemon=True).start()
            yield args | {"node_rank": 0}

    def close(self) -> None:
        """The other nodes are about to end, as they should."""
        self._closing = True

    def _end_with_others(self, work: list[Any]) -> None:
        (ended, *_), _ = ray.wait(work, num_returns=1)
        if self._closing:
            return
        try:
            ray.get(ended, timeout=ANSWER_S)
            logger.error("the workers of another node of this engine ended; it ends too")
        except ray.exceptions.RayError as error:
            logger.error("another node of this engine ended; it ends too: %s", error)
        logging.shutdown()
        os._exit(1)


class NodeOfEngine:
    """The actor on one further node."""

    def work(self, args: dict[str, Any]) -> None:
        """Run vLLM's workers of this node until one of them ends."""
        os.environ |= {HOST_VARIABLE: ray.util.get_node_ip_address(), ACTOR_PROCESS: str(os.getpid())}
        setup_actor_logging()
        bind_to_cores()
        activity()
        choose_interface()
        from vllm import AsyncEngineArgs
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        config = AsyncEngineArgs(**args).create_engine_config(headless=True)
        MultiprocExecutor(config, monitor_workers=False).start_worker_monitor(inline=True)
