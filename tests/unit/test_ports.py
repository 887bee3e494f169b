"""A port that is held: others cannot have it, and vLLM's rendezvous can."""

import errno
import socket
from datetime import timedelta

import psutil
import pytest
from torch.distributed import TCPStore
from vllm.distributed.utils import StatelessProcessGroup

from rlhf_ray.errors import ResourceError
from rlhf_ray.runtime.cluster import connection
from rlhf_ray.runtime.ports import HEAD_PORT, check_port_of_head, held_port, meeting_store


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


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_a_meeting_store_listens_on_its_host_alone(host):
    store = meeting_store(host, timedelta(seconds=10))
    listening = [one.laddr for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == store.port] == [host]
    client = TCPStore(host, store.port, is_master=False, timeout=timedelta(seconds=10))
    client.set("key", "value")
    assert store.get("key") == b"value"


def test_no_two_blocks_hold_the_same_port():
    with held_port("127.0.0.1") as one, held_port("127.0.0.1") as other:
        assert one != other


def test_a_port_in_use_is_one_error_before_ray_starts(alone, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setenv(HEAD_PORT, str(port))
        with pytest.raises(ResourceError) as refused, connection():
            pytest.fail("started")
    text = str(refused.value)
    assert text.startswith(f"RAY_GCS_SERVER_PORT: Ray cannot listen on port {port} of this machine (")
    assert "already in use" in text and "set another port" in text
    check_port_of_head()  # it is free again


def test_what_is_no_port_is_one_error(monkeypatch):
    for text in ("head", "70000"):
        monkeypatch.setenv(HEAD_PORT, text)
        with pytest.raises(ResourceError, match=f"^RAY_GCS_SERVER_PORT: found '{text}', expected a port"):
            check_port_of_head()


def test_the_variable_is_that_of_the_installed_ray():
    from ray._private import ray_constants

    assert ray_constants.GCS_PORT_ENVIRONMENT_VARIABLE == HEAD_PORT
