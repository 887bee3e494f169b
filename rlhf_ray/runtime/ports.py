"""Ports that stay ours between the moment they are chosen and the moment somebody listens on them, the store where
processes meet, and a port that a user may have chosen.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rlhf_ray.errors import ResourceError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# The environment variable by which Ray is told where the head of a new cluster listens.
HEAD_PORT = "RAY_GCS_SERVER_PORT"


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


def meeting_store(host: str, timeout: timedelta) -> "TCPStore":
    """A store where processes meet, on a port of the operating system's choice.

    It listens on `host` alone; one that torch opens for itself listens on every address of the machine, and whoever
    reaches it may read and write.
    """
    from torch.distributed import TCPStore

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
    )


def check_port_of_head() -> None:
    """Look at the one port of a cluster of our own that a user can set; all others are the system's choice.

    Ray itself ends in a traceback after some forty seconds where it cannot listen there.

    Raises:
        ResourceError: it is in use, or no port.
    """
    text = os.environ.get(HEAD_PORT)
    if not text:
        return
    if not text.isdecimal() or not 0 <= int(text) < 2**16:
        raise ResourceError(f"{HEAD_PORT}: found {text!r}, expected a port such as 6379; set one, or unset it")
    with socket.socket() as trial:
        # A port whose last connections have just ended is free to a listener.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", int(text)))
        except OSError as error:
            raise ResourceError(
                f"{HEAD_PORT}: Ray cannot listen on port {text} of this machine ({error}); set another port, or unset "
                "the variable and let Ray choose a free one"
            ) from None
