"""Fixtures that every test may use."""

import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Property tests measure nothing: on a busy machine a first example takes as long as it takes.
settings.register_profile("rlhf_ray", deadline=None)
settings.load_profile("rlhf_ray")

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and sends one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and models beside the checkout; tests that need it skip where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the folder `shared` with real data beside the checkout")
    return SHARED


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that is in no Ray cluster, though other tests may have one here; and none is to be started."""
    import ray

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("Ray itself was asked")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "shutdown", refuse)
