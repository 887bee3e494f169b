"""Addresses where no Ray cluster is: one error each, before Ray itself would try for minutes."""

import re
import socket
from pathlib import Path

import pytest
from ray.exceptions import AuthenticationError
from sockets import unanswered

from rlhf_ray.config import from_dict
from rlhf_ray.errors import ResourceError
from rlhf_ray.runtime import reach
from rlhf_ray.runtime.cluster import connection
from rlhf_ray.stages.sft import train_sft

SFT = {
    "data": {"path": "demos.jsonl", "max_tokens": 64},
    "model": {
        "chat_template": "default",
        "scratch": {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 2, "vocab_size": 300, "max_length": 64},
    },
    "sft": {},
}


@pytest.fixture
def closed():
    """A port where nobody listens."""
    with socket.socket() as holder:
        holder.bind(("", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def silent():
    """A port where somebody takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_host_is_unreachable_that_neither_takes_nor_refuses_connections(closed, silent):
    with unanswered() as address:
        assert reach.unreachable([("127.0.0.1", closed), ("127.0.0.1", silent), address]) == {address}
    assert reach.unreachable([]) == set()


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("127.0.0.1:{closed}", "Connection refused"),
        ("nowhere.invalid:6379", "not known"),
        ("head", "Invalid address format"),
        ("http://127.0.0.1:8265", "expected HEAD:PORT"),
    ],
)
def test_an_address_where_nothing_is_names_what_gave_it_and_what_was_found(alone, closed, address, found):
    address = address.format(closed=closed)
    with pytest.raises(ResourceError) as refused, connection(address, "--address"):
        pytest.fail("connected")
    text = str(refused.value)
    assert text.startswith(f"--address: no Ray cluster answers at '{address}' (")
    assert found in text
    assert "`ray start --head`" in text


def test_an_address_of_ray_client_is_refused_with_what_to_do_instead(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    for address in ("ray://head:10001", "auto"):
        with pytest.raises(ResourceError, match=r"^--address: 'ray://head:10001' is an address of Ray Client.*submit"):
            reach.check_reachable(address, "--address")


def test_what_listens_and_is_no_ray_head_has_a_deadline(silent, monkeypatch):
    monkeypatch.setattr(reach, "ANSWER_TIMEOUT_S", 0.5)
    with pytest.raises(ResourceError, match=r"does not answer as a Ray head does \(no answer within 0\.5 s\)"):
        reach.check_reachable(f"127.0.0.1:{silent}", "run.ray_address")


def test_an_address_of_the_environment_is_named_as_such(alone, closed, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed}")
    for address, asked in ((None, "RAY_ADDRESS"), ("auto", "run.ray_address")):
        with pytest.raises(ResourceError, match=rf"^{asked}: no Ray cluster answers at .*refused"), connection(address):
            pytest.fail("connected")


def test_a_run_at_an_address_where_nothing_answers_is_one_error_and_can_be_started_again(
    alone, closed, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    row = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}\n'
    Path("demos.jsonl").write_text(row * 3)
    config = from_dict(SFT | {"run": {"dir": "runs/a", "ray_address": f"127.0.0.1:{closed}"}}, "sft")
    for _ in range(2):
        with pytest.raises(ResourceError, match=r"^run\.ray_address: no Ray cluster answers at '127\.0\.0\.1:"):
            train_sft(config)
    assert not Path("runs/a/metrics.jsonl").exists()


def test_what_ray_says_about_a_token_or_versions_becomes_what_to_do():
    error = AuthenticationError("Token authentication is enabled but no token was found. Ensure this. Ensure that.")
    text = str(reach.explained(error, "head:6379", "--address"))
    assert text.startswith("--address: no access to the Ray cluster at 'head:6379' (Token authentication is enabled ")
    assert re.search(r"no token was found\); set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN ", text)
    assert "Ensure" not in text

    try:
        try:
            raise RuntimeError("This node is none of the cluster's")
        except RuntimeError as cause:
            raise ConnectionError("Failed to connect") from cause
    except ConnectionError as failed:
        assert "(This node is none of the cluster's)" in str(reach.explained(failed, "head:6379", "--address"))
