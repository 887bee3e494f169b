"""Ports that stay ours between the moment they are chosen and the moment somebody listens on them."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port(host: str) -> Iterator[int]:
    """A free port of `host` that nobody else is given inside the block.

    For code that takes a number, such as vLLM's rendezvous, which binds with SO_REUSEADDR: under Linux it may do so
    while this socket, bound with the same option, does not listen; a process that asks for any free port, or connects,
    gets another.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, 0))
        yield holder.getsockname()[1]
