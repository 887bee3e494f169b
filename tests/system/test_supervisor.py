"""What the supervisor sees of real processes, and what it does about those that die or hang."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from sockets import unanswered

from rlhf_ray.errors import ActorDied, Stalled
from rlhf_ray.runtime import supervisor as supervisor_module
from rlhf_ray.runtime.cluster import actor_environment
from rlhf_ray.runtime.lifecycle import Event, State
from rlhf_ray.runtime.patience import Patience
from rlhf_ray.runtime.remote import free_name, get
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.tracking.activity import Activity, activity
from rlhf_ray.tracking.logs import ACTOR, LOGS

FLOOR_S = 6.0


class Worker:
    """A process of a run, as far as the supervisor is concerned."""

    def load(self) -> int:
        """Begin to say what it does; its number."""
        activity()
        return os.getpid()

    def work(self, seconds: float) -> str:
        """Be busy."""
        with activity().busy("work"):
            time.sleep(seconds)
        return "done"


@pytest.fixture
def run_dir(ray_cluster: None, tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


@pytest.fixture
def supervisor(run_dir: Path) -> Iterator[Supervisor]:
    driver = Activity("driver", run_dir)
    with Supervisor(run_dir, Patience(FLOOR_S, 60.0)) as supervisor:
        yield supervisor
    driver.close()


def start(run_dir: Path, name: str) -> tuple[Any, int]:
    environment = {**actor_environment(1), ACTOR: name, LOGS: str(run_dir / "logs")}
    actor = ray.remote(Worker).options(num_cpus=0, name=free_name(name), runtime_env={"env_vars": environment}).remote()
    return actor, get(actor.load.remote(), f"{name}: start", 60.0)


def await_state(supervisor: Supervisor, name: str, state: State, patience_s: float = 30.0) -> None:
    deadline = time.monotonic() + patience_s
    while supervisor.state(name) is not state:
        assert time.monotonic() < deadline, f"{name} is {supervisor.state(name)}, and {state} was expected"
        time.sleep(0.05)


def test_the_death_of_a_process_that_nobody_asks_anything_is_noticed_and_told_once(
    supervisor: Supervisor, run_dir: Path
):
    told: list[ActorDied] = []
    heard = threading.Event()

    def lost(error: ActorDied) -> None:
        told.append(error)
        heard.set()

    actor, process = start(run_dir, "idle-0")
    supervisor.watch("idle-0", actor, lost=lost)
    supervisor.note("idle-0", Event.LOADED)
    await_state(supervisor, "idle-0", State.SERVING)
    os.kill(process, signal.SIGKILL)
    assert heard.wait(30)
    assert supervisor.state("idle-0") is State.DEAD
    assert "idle-0: the actor died" in str(told[0])
    supervisor.check()  # somebody makes up for it

    actor, _ = start(run_dir, "idle-0")
    supervisor.watch("idle-0", actor, lost=lost)
    assert supervisor.state("idle-0") is State.STARTING
    supervisor.note("idle-0", Event.LOADED)
    assert len(told) == 1
    supervisor.retire("idle-0")
    supervisor.end("idle-0", actor)
    assert supervisor.state("idle-0") is State.RETIRED
    assert len(told) == 1


def test_a_death_that_nobody_makes_up_for_ends_the_wait_for_others(supervisor: Supervisor, run_dir: Path):
    actor, process = start(run_dir, "alone-0")
    supervisor.watch("alone-0", actor)
    supervisor.note("alone-0", Event.LOADED)
    supervisor.check()
    os.kill(process, signal.SIGKILL)
    await_state(supervisor, "alone-0", State.DEAD)
    deadline = time.monotonic() + 10
    with pytest.raises(ActorDied, match="alone-0: the actor died"):
        while time.monotonic() < deadline:
            supervisor.check()
            time.sleep(0.05)


def test_a_process_that_is_stopped_is_suspect_then_ended_and_whoever_waits_sees_a_death(
    supervisor: Supervisor, run_dir: Path
):
    actor, process = start(run_dir, "stopped-0")
    lost = threading.Event()
    supervisor.watch("stopped-0", actor, lost=lambda error: lost.set())
    supervisor.note("stopped-0", Event.LOADED)
    answer = actor.work.remote(1.0)
    assert get(answer, "work", 60.0) == "done"
    time.sleep(2.5)  # it has been heard of
    os.kill(process, signal.SIGSTOP)
    answer = actor.work.remote(0.0)
    await_state(supervisor, "stopped-0", State.SUSPECT)
    with pytest.raises(ActorDied):
        get(answer, "work of a stopped process", 60.0)
    assert lost.wait(10)
    assert supervisor.state("stopped-0") is State.DEAD
    (report,) = (run_dir / "stalls").glob("*.txt")
    assert "stopped-0 has given no sign for" in report.read_text()
    assert "Waiting for it: nobody" in report.read_text()  # no driver says what it does here


def test_a_process_that_is_stopped_for_a_while_goes_on(supervisor: Supervisor, run_dir: Path):
    supervisor.patience.floor_s = 60.0
    actor, process = start(run_dir, "paused-0")
    supervisor.watch("paused-0", actor)
    supervisor.note("paused-0", Event.LOADED)
    time.sleep(2.5)
    os.kill(process, signal.SIGSTOP)
    await_state(supervisor, "paused-0", State.SUSPECT)
    os.kill(process, signal.SIGCONT)
    await_state(supervisor, "paused-0", State.SERVING)
    supervisor.check()
    supervisor.retire("paused-0")
    supervisor.end("paused-0", actor)


def test_a_process_of_another_host_gets_its_signal_there(
    supervisor: Supervisor, run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    actor, process = start(run_dir, "far-0")
    os.kill(process, signal.SIGSTOP)  # so that Ray's own way does nothing
    monkeypatch.setattr(supervisor_module, "_own_node", lambda: "another")
    supervisor.end("far-0", actor)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_works_for_long_without_an_answer_is_left_alone(supervisor: Supervisor, run_dir: Path):
    actor, _ = start(run_dir, "busy-0")
    supervisor.watch("busy-0", actor)
    supervisor.note("busy-0", Event.LOADED)
    assert get(actor.work.remote(2 * FLOOR_S), "long work", 60.0) == "done"
    assert supervisor.state("busy-0") is State.SERVING
    supervisor.retire("busy-0")
    supervisor.end("busy-0", actor)


def test_a_process_whose_host_is_cut_off_is_ended_although_it_writes_that_it_works(
    supervisor: Supervisor, run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    supervisor.patience.floor_s = 2 * FLOOR_S  # a look takes seconds now, and is to find it suspect before
    actor, _ = start(run_dir, "cut-0")
    with unanswered() as address:
        monkeypatch.setattr(supervisor_module, "_address_of", lambda actor: address)
        supervisor.watch("cut-0", actor)
        supervisor.note("cut-0", Event.LOADED)
        time.sleep(2.5)  # it has been heard of
        answer = actor.work.remote(60.0)
        await_state(supervisor, "cut-0", State.SUSPECT)
        with pytest.raises(ActorDied):
            get(answer, "work of a process that is cut off", 60.0)
        await_state(supervisor, "cut-0", State.DEAD)
    with pytest.raises(ActorDied, match=r"cut-0 has given no sign for .*; its host takes no connections"):
        supervisor.check()


def test_of_several_that_work_together_the_death_of_one_counts_before_what_others_raise(run_dir: Path):
    class Fragile:
        def fail(self, delay_s: float) -> None:
            time.sleep(delay_s)
            if delay_s:
                os._exit(1)
            raise RuntimeError("connection closed by peer")

    actors = [ray.remote(Fragile).options(num_cpus=0).remote() for _ in range(2)]
    with pytest.raises(ActorDied, match="together: the actor died"):
        get([actor.fail.remote(delay) for actor, delay in zip(actors, (0.0, 1.0), strict=True)], "together", 60.0)
    environment = {"env_vars": actor_environment(1)}
    slow = ray.remote(Worker).options(num_cpus=0, runtime_env=environment).remote()
    with pytest.raises(Stalled, match="slow work: no answer within"):
        get(slow.work.remote(60.0), "slow work", 0.5)
    for actor in [*actors, slow]:
        ray.kill(actor)
