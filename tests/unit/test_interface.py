"""Which interface gloo is pointed at."""

import os

import pytest

from rlhf_ray.runtime.interface import VARIABLE, choose_interface


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch):
    """Says which address Ray has for this node; the variable is as it was afterwards."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)

    def at(address: str) -> None:
        monkeypatch.setattr("ray.util.get_node_ip_address", lambda: address)

    return at


def test_the_interface_with_the_nodes_address(node):
    node("127.0.0.1")
    choose_interface()
    assert os.environ[VARIABLE] == "lo"


def test_what_the_user_set_stays(node, monkeypatch):
    monkeypatch.setenv(VARIABLE, "eth7")
    node("127.0.0.1")
    choose_interface()
    assert os.environ[VARIABLE] == "eth7"


def test_an_address_that_no_interface_has_leaves_the_choice_to_gloo(node):
    node("203.0.113.9")  # such as that of a gateway which translates addresses
    choose_interface()
    assert VARIABLE not in os.environ
