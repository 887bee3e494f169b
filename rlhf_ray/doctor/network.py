"""The network between nodes, measured with the collective that trainers use: gloo, or NCCL between GPUs.

Neighbours of a ring exchange messages pair by pair, so that a node that cannot be reached has a name, and then all
nodes reduce together. Every wait has a deadline, and the processes are the doctor's own, so that one that hangs inside
a collective can be ended.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from rlhf_ray.doctor.verdicts import Exchange
from rlhf_ray.runtime.interface import choose_interface
from rlhf_ray.runtime.ports import meeting_store

Facts = dict[str, Any]

LARGE_BYTES = 16 * 2**20
REPETITIONS = 5
# For a process to start and import torch, which takes long from a cold shared file system.
LOAD_TIMEOUT_S = 120.0
PORT_TIMEOUT_S = 10.0


class Peer:
    """The actor on a node. Sent by value, as the probe is."""

    def __init__(self) -> None:
        self._store: Any = None

    def load(self) -> Facts:
        """Import torch, which takes its time."""
        import torch.distributed  # noqa: F401

        choose_interface()

        return {}

    def listen(self, host: str, timeout_s: float) -> Facts:
        """Rank 0: open the rendezvous on a port of the operating system's choice, as the trainers' rank 0 does."""
        self._store = meeting_store(host, timedelta(seconds=timeout_s))
        return {"port": self._store.port}

    def meet(self, host: str, port: int, rank: int, world_size: int, backend: str, timeout_s: float) -> Facts:
        """Join the others and measure.

        Returns:
            Median seconds of each kind of message, and `bytes` of a large one; or `error`, with the `phase` in which
            it came.
        """
        import torch.distributed as dist

        timeout = timedelta(seconds=timeout_s)
        try:
            store = self._store if rank == 0 else dist.TCPStore(host, port, is_master=False, timeout=timeout)
        except RuntimeError as error:
            return {"error": _first_line(error), "phase": "rendezvous"}
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
            return _measure(rank, world_size, backend)
        except RuntimeError as error:
            return {"error": _first_line(error), "phase": "collective"}
        finally:
            self._store = None
            if dist.is_initialized():
                dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _measure(rank: int, world_size: int, backend: str) -> Facts:
    """Seconds for one all-reduce, and between two ranks for one message one way, large and of 8 bytes."""
    import torch
    import torch.distributed as dist

    device = "cuda:0" if backend == "nccl" else "cpu"

    def reduce(data: Any) -> None:
        dist.all_reduce(data)

    def there_and_back(data: Any) -> None:
        for sender in (0, 1):
            if rank == sender:
                dist.send(data, 1 - rank)
            else:
                dist.recv(data, 1 - rank)

    def seconds(operation: Callable[[Any], None], count: int) -> float:
        data = torch.zeros(count, device=device)
        taken = []
        for _ in range(REPETITIONS + 1):
            started = time.perf_counter()
            operation(data)
            if backend == "nccl":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[1:])  # the first one opens connections

    floats = LARGE_BYTES // 4
    facts = {
        "bytes": LARGE_BYTES,
        "all_reduce_s": seconds(reduce, floats),
        "small_all_reduce_s": seconds(reduce, 2),
    }
    if world_size == 2:
        facts["message_s"] = seconds(there_and_back, floats) / 2
        facts["small_message_s"] = seconds(there_and_back, 2) / 2
    dist.barrier()
    return facts


def ring(count: int) -> list[list[tuple[int, int]]]:
    """The pairs of neighbours of a ring, in rounds in which every node has one partner at most."""
    edges = [(first, (first + 1) % count) for first in range(count if count > 2 else count - 1)]
    closing = [edges.pop()] if count > 2 and count % 2 else []
    return [pairs for pairs in (edges[0::2], edges[1::2], closing) if pairs]


class Peers:
    """The driver's side of the actors, which it starts when they are needed and ends at the end of the block.

    Args:
        addresses: the address of each node, by its name.
        start: starts a `Peer` on the node of that name.
        backend: "gloo" or "nccl".
    """

    def __init__(self, addresses: Mapping[str, str], start: Callable[[str], Any], backend: str) -> None:
        self._addresses = addresses
        self._start = start
        self._backend = backend
        self._actors: dict[str, Any] = {}

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._actors):
            self._end(name)

    def _end(self, name: str) -> None:
        ray.kill(self._actors.pop(name))

    def exchange(self, groups: Sequence[tuple[str, ...]], timeout_s: float) -> list[Exchange]:
        """Let each group of nodes meet by itself, all at once; no node may be in two of them.

        Takes no longer than `LOAD_TIMEOUT_S`, `PORT_TIMEOUT_S` and three times `timeout_s` together.
        """
        names = [name for group in groups for name in group]
        started = [name for name in names if name not in self._actors]
        self._actors |= {name: self._start(name) for name in started}
        loaded = gather(
            {name: self._actors[name].load.remote() for name in started}, "starting and importing torch", LOAD_TIMEOUT_S
        )
        ready = {group[0]: group for group in groups if not any("error" in loaded.get(name, {}) for name in group)}
        opened = gather(
            {first: self._actors[first].listen.remote(self._addresses[first], timeout_s) for first in ready},
            "opening a port",
            PORT_TIMEOUT_S,
        )
        refs = {
            name: self._actors[name].meet.remote(
                self._addresses[first], opened[first]["port"], rank, len(group), self._backend, timeout_s
            )
            for first, group in ready.items()
            if "error" not in opened[first]
            for rank, name in enumerate(group)
        }
        # A rank waits up to `timeout_s` for the rendezvous, as long for the group, and as long for an answer.
        met = gather(refs, f"meeting over {self._backend}", 3 * timeout_s)
        answers = {name: met.get(name) or opened.get(name) or loaded.get(name, {}) for name in names}
        exchanges = [Exchange(group, tuple(answers[name] for name in group)) for group in groups]
        for exchange in exchanges:
            if exchange.failed:
                for name in exchange.nodes:
                    self._end(name)
        return exchanges


def gather(refs: Mapping[str, Any], what: str, timeout_s: float) -> dict[str, Facts]:
    """What each node answers, by its name, or the error in its place: a dead actor, or none within the deadline."""
    deadline = time.monotonic() + timeout_s
    answers: dict[str, Facts] = {}
    for name, ref in refs.items():
        try:
            answers[name] = ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
        except GetTimeoutError:
            answers[name] = {"error": f"{what}: no answer within {timeout_s:g} s"}
        except RayError as error:
            answers[name] = {"error": f"{what}: {_first_line(getattr(error, 'cause', None) or error)}"}
    return answers
