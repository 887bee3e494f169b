"""A port that is held: others cannot have it, and vLLM's rendezvous can."""

import errno
import socket

import pytest
from vllm.distributed.utils import StatelessProcessGroup

from rlhf_ray.runtime.ports import held_port


def test_vllm_listens_on_the_port_while_it_is_held():
    with held_port("127.0.0.1") as port:
        group = StatelessProcessGroup.create("127.0.0.1", port, rank=0, world_size=1, store_timeout=10)
        client = socket.create_connection(("127.0.0.1", port), timeout=5)
        client.close()
        del group


def test_nobody_else_gets_the_port():
    with held_port("127.0.0.1") as port, socket.socket() as plain:
        with pytest.raises(OSError) as error:
            plain.bind(("127.0.0.1", port))
        assert error.value.errno == errno.EADDRINUSE


def test_no_two_blocks_hold_the_same_port():
    with held_port("127.0.0.1") as one, held_port("127.0.0.1") as other:
        assert one != other
