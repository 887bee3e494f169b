"""What may happen to a run, each with one cause, and a soak of everything in turn."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from chaos_runs import Case, Place
from hosts import HEAD, cluster, link, network, run

from rlhf_ray.config import PPOConfig
from rlhf_ray.runtime.chaos import HAPPENED, Event

SHORT_LIMIT_S = 5.0  # of a reward function
BACK_S = 5.0  # until a node that went down is there again


def killed(actor: str, state: str, count: int, name: str = "failure", **how: Any) -> Event:
    """One process, in the state that it reaches for the n-th time."""
    return Event(name, actor, state, count, **how)


# ---- clusters and disks


@contextmanager
def nodes(folder: Path, *, engines: int = 0, trainers: int = 0, cpus: int, returns: bool = False, **head: Any):
    """A cluster of nodes on this machine: a head with so many CPUs, and nodes with one CPU each, by their role.

    One that goes down comes back if it `returns`.
    """
    from ray.cluster_utils import Cluster

    # Handlers of signals can be set in the main thread alone, and the node that comes back is added by another.
    cluster = Cluster(shutdown_at_exit=not returns)

    def add(role: str) -> None:
        cluster.add_node(num_cpus=1, labels={"role": role}, object_store_memory=100 * 2**20)

    def bring_back(role: str) -> None:
        while not list(folder.glob(f"*{HAPPENED}")):
            if ended.wait(0.2):
                return
        if not ended.wait(BACK_S):
            add(role)

    ended = threading.Event()
    cluster.add_node(num_cpus=cpus, labels={"role": "head"}, include_dashboard=False, **head)
    try:
        for role, count in (("engine", engines), ("trainer", trainers)):
            for _ in range(count):
                add(role)
        cluster.wait_for_nodes()
        returning = threading.Thread(target=bring_back, args=("engine" if engines else "trainer",), daemon=True)
        if returns:
            returning.start()
        yield Place({"RAY_ADDRESS": cluster.address})
    finally:
        ended.set()
        if returns:
            returning.join()
        cluster.shutdown()


FILL = """
import sys, time
import numpy, ray
ray.init(address=sys.argv[1], log_to_driver=False)
held = [ray.put(numpy.ones(8 * 2**20, dtype="uint8")) for _ in range(20)]
print("full", flush=True)
time.sleep(3600)
"""


@contextmanager
def full_object_store(folder: Path) -> Iterator[Place]:
    """A cluster whose object store somebody else has filled twice over."""
    with nodes(folder, cpus=2, object_store_memory=80 * 2**20) as place:
        command = [sys.executable, "-c", FILL, place.environment["RAY_ADDRESS"]]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            try:
                assert other.stdout.readline() == "full\n"
                yield place
            finally:
                other.kill()


@contextmanager
def small_disk(folder: Path, *, mib: float) -> Iterator[Place]:
    """Checkpoints go to a file system of their own, which others fill until the run has met that. Needs root."""
    checkpoints = folder / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(mib * 2**20)}", "none", str(checkpoints)], check=True)
    ended = threading.Event()

    def fill_and_free() -> None:
        while not list(checkpoints.glob("step_*")):
            if ended.wait(0.05):
                return
        with (checkpoints / "others").open("wb") as file:
            try:
                while True:
                    file.write(bytes(2**16))
                    file.flush()
            except OSError:
                (folder / f"failure{HAPPENED}").write_text(
                    f'{{"time": {time.time()}, "victim": "driver", "process": 0}}'
                )
        while not list(folder.glob("output-1.txt")) and not ended.wait(0.2):
            continue
        (checkpoints / "others").unlink()

    filling = threading.Thread(target=fill_and_free, daemon=True)
    filling.start()
    try:
        yield Place()
    finally:
        ended.set()
        filling.join()
        for name in checkpoints.glob("step_*"):
            subprocess.run(["cp", "-r", str(name), str(folder)], check=True)
        subprocess.run(["umount", str(checkpoints)], check=True)
        for name in folder.glob("step_*"):
            name.rename(checkpoints / name.name)


@contextmanager
def no_tracker(folder: Path) -> Iterator[Place]:
    """Nobody listens where W&B should be."""
    yield Place({"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true"})


LINK_S = 30.0  # to cut a link and to heal it, on a machine that is busy
HOSTS = {"head": "head", "engine-a": "engine", "engine-b": "engine"}


@contextmanager
def hosts(folder: Path, *, cut_for_s: float) -> Iterator[Place]:
    """Three hosts with links of their own; that of the process that is stopped is cut, and healed. Needs root."""
    ended = threading.Event()

    def cut(name: str) -> None:
        while not (folder / f"{name}{HAPPENED}").exists():
            if ended.wait(0.05):
                return
        process = json.loads((folder / f"{name}{HAPPENED}").read_text())["process"]
        end = link([*HOSTS].index(run("ip", "netns", "identify", str(process)).strip()))
        run("ip", "link", "set", end, "down")
        os.kill(process, signal.SIGCONT)
        ended.wait(cut_for_s)
        run("ip", "link", "set", end, "up")

    with ExitStack() as stack:
        # A socket's path is short.
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts", dir="/tmp")))
        stack.enter_context(network(HOSTS))
        # Nobody else reaches these hosts; this process, which asks them, has read its own Ray variables already.
        open_to_all = {"RAY_AUTH_MODE": "disabled"}
        processes = stack.enter_context(cluster(files, HOSTS, **open_to_all))
        cutting = threading.Thread(target=cut, args=("failure",), daemon=True)
        cutting.start()
        stack.callback(cutting.join)
        stack.callback(ended.set)
        inside = open_to_all | {"RAY_ADDRESS": f"{HEAD}:6379"}
        within = ("nsenter", f"--target={processes[0]}", "--mount", "--net", "--")
        yield Place(inside, within, partial(cutting.join, cut_for_s + LINK_S))


# ---- cases

RANKS = {"policy": {"processes": 2, "cpus": 0.25}}
HANGS = {"run": {"min_timeout_s": 10.0}}


def _function(name: str) -> dict[str, dict[str, Any]]:
    item = {"path": f"chaos_rewards:{name}", "timeout_s": SHORT_LIMIT_S, "min_scored": 0.01}
    # A call that fails takes all responses with it that are scored together: a few of an iteration's.
    return {"reward": {"functions": [item]}, "reference": {"cpus": 0.25, "micro_batch_tokens": 64}}


def _of_function(name: str, happens: str) -> Case:
    """A function that fails at its second call; its samples are left out, so that the numbers differ."""
    event = killed(f"reward-{name}", "scores", 2, action="mark")
    return Case(f"function-{name}", happens, (event,), only_here=_function(name), equal=False)


def _back(engine: str, after: str = "failure") -> tuple[Event, Event]:
    """Before the fourth iteration the loop waits for the engine's successor, which takes longer than all iterations."""
    return (
        Event("up", engine, "up", action="mark", after=after),
        Event("held", "driver", "iteration", 4, action="hold", until="up"),
    )


def _labels(**roles: str) -> dict[str, dict[str, str]]:
    """Where the processes of each group belong: to nodes of a role, the others to the head."""
    return {group: {"role": roles.get(group, "head")} for group in PPOConfig.groups}


def _of_engine(name: str, happens: str, failure: Event, **more: Any) -> Case:
    return Case(f"engine-{name}", happens, (failure, *_back(failure.victim or failure.actor)), **more)


ENGINES = [
    _of_engine("idle", "an engine is killed while it is idle", killed("driver", "train", 2, victim="rollout-1")),
    _of_engine("generating", "an engine is killed while it samples", killed("rollout-1", "tokens", 4)),
    _of_engine("transfer", "an engine is killed while it takes new weights", killed("rollout-1", "receiving", 3)),
    _of_engine("start", "an engine is killed while the run starts", killed("rollout-1", "start-up", 1)),
    Case(
        "engine-successor",
        "an engine is killed while it samples, and its successor while it starts",
        (
            killed("rollout-1", "tokens", 2),
            killed("rollout-1", "start-up", 1, "second failure", after="failure"),
            *_back("rollout-1", after="second failure"),
        ),
    ),
    Case(
        "engine-only",
        "the only engine is killed while it samples",
        (killed("rollout-0", "tokens", 4),),
        only_here={"rollout": {"engines": 1}},
    ),
    Case(
        "engine-never-again",
        "the only engine is killed while it samples, and each of its successors while it starts",
        (
            killed("rollout-0", "tokens", 6),
            killed("rollout-0", "start-up", 1, "second failure", after="failure"),
            killed("rollout-0", "start-up", 1, "third failure", after="second failure"),
            killed("rollout-0", "start-up", 1, "fourth failure", after="third failure"),
        ),
        only_here={"rollout": {"engines": 1}, "run": {"checkpoint_every": 0}},
        equal=False,
        exit_code=3,
    ),
    _of_engine(
        "hung", "an engine hangs while it samples", killed("rollout-1", "tokens", 5, action="stop"), only_here=HANGS
    ),
    _of_engine(
        "hung-transfer",
        "an engine hangs while it takes new weights",
        killed("rollout-1", "receiving", 3, action="stop"),
        only_here=HANGS,
    ),
]
SCORERS = [
    Case("reference", "the reference is killed in a forward pass", (killed("reference-0", "log-probabilities", 2),)),
    Case("reward", "the reward model is killed in a forward pass", (killed("reward-0", "scores", 2),)),
    Case(
        "reference-hung",
        "the reference hangs in a forward pass",
        (killed("reference-0", "log-probabilities", 3, action="stop"),),
        only_here=HANGS,
    ),
    Case(
        "engine-and-reference",
        "an engine and the reference are killed at once",
        (
            killed("reference-0", "log-probabilities", 2, "engine", victim="rollout-1"),
            killed("reference-0", "log-probabilities", 2, "reference"),
        ),
    ),
]
TRAINERS = [
    Case("critic-forward", "the critic is killed in a forward pass", (killed("critic-0", "forward", 2),)),
    Case(
        "policy-backward",
        "one of two ranks of the policy is killed in backward",
        (killed("policy-1", "backward", 3),),
        RANKS,
    ),
    Case(
        "policy-optimizer", "the policy is killed before its optimizer step", (killed("policy-0", "optimizer step", 3),)
    ),
    # A transfer's probe has tokens, too: those of the first, then of each step and the probe after it.
    Case(
        "policy-stepped",
        "the policy is killed after its optimizer step, unanswered",
        (killed("policy-0", "tokens", 6),),
    ),
    Case(
        "policy-checkpoint",
        "the policy is killed while it writes a checkpoint",
        (killed("policy-0", "writing a checkpoint", 2),),
    ),
    Case("policy-transfer", "the policy is killed while it sends weights", (killed("policy-0", "transfer", 3),)),
    Case("policy-hung", "the policy hangs in backward", (killed("policy-0", "backward", 4, action="stop"),), {}, HANGS),
]
DRIVERS = [
    Case(f"driver-{name}", f"the driver is killed {when}", (killed("driver", state, count),), starts=2)
    for name, state, count, when in (
        ("start", "start-up", 1, "while the groups start"),
        ("wait", "wait", 3, "while it waits for samples"),
        ("advantages", "advantages", 3, "while it computes advantages"),
        ("train", "train", 3, "while policy and critic train"),
        ("transfer", "transfer", 4, "while weights are sent"),
        ("checkpoint", "sealing a checkpoint", 2, "while it seals a checkpoint"),
        ("export", "export", 1, "after the last iteration, while models are written"),
    )
]
DRIVERS.append(
    Case(
        "driver-ahead",
        "the driver is killed while policy and critic train, and engines sample for the next iteration",
        (killed("driver", "train", 3),),
        {"ppo": {"iterations": 5, "prompts_per_iteration": 8, "max_staleness": 1}},
        starts=2,
        equal=False,
    )
)
NODES = [
    Case(
        "node-engine",
        "the node of one of two engines goes down while it samples",
        (killed("rollout-1", "tokens", 4, action="kill node"),),
        only_here={"placement": {"labels": _labels(rollout="engine"), "spread": ["rollout"]}},
        around=partial(nodes, cpus=1, engines=2),
    ),
    Case(
        "node-policy",
        f"the policy's node goes down in backward; another comes {BACK_S:g} s later",
        (killed("policy-0", "backward", 3, action="kill node"),),
        only_here={"placement": {"labels": _labels(policy="trainer")}},
        around=partial(nodes, cpus=2, trainers=1, returns=True),
    ),
]
NODES += [
    Case(
        f"network-{name}",
        f"the host of one of two engines is cut off while it samples, for {seconds} s",
        (killed("rollout-1", "tokens", 4, action="stop"),),
        only_here=HANGS | {"placement": {"labels": _labels(rollout="engine"), "spread": ["rollout"]}},
        around=partial(hosts, cut_for_s=seconds),
        heals=seconds < HANGS["run"]["min_timeout_s"],
    )
    for name, seconds in (("blink", 5), ("cut", 90))
]
SURROUNDINGS = [
    Case(
        "disk-full-once",
        "a rank finds the disk full in the middle of a checkpoint",
        (killed("policy-0", "writing a checkpoint", 2, action="no space"),),
    ),
    Case(
        "disk-full",
        "the disk of the checkpoints is full, until the command is given again",
        (Event("failure", "nobody", "nothing", victim="driver"),),  # `small_disk` says when it is
        starts=2,
        around=partial(small_disk, mib=12),
    ),
    Case("object-store-full", "others have filled the object store", around=full_object_store),
    _of_function("hangs", "a reward function hangs"),
    _of_function("raises", "a reward function raises an error"),
    _of_function("gives_nan", "a reward function returns NaN"),
    Case("tracker", "W&B does not answer", only_here={"tracking": {"wandb": "online"}}, around=no_tracker),
]

# Every step of the loop once, one after the other: each failure is in an iteration of its own.
ONE_AFTER_ANOTHER = Case(
    "one-after-another",
    "an engine, the reference and the policy are killed, each in an iteration of its own",
    (
        killed("rollout-1", "tokens", 2, "engine"),
        killed("reference-0", "log-probabilities", 3, "reference"),
        killed("policy-0", "backward", 4, "policy"),
    ),
)

# What a soak draws from, and how often that is reached in an iteration.
STRIKES = [
    ("rollout-0", "tokens", 2),
    ("rollout-1", "tokens", 2),
    ("rollout-1", "receiving", 1),
    ("reference-0", "log-probabilities", 1),
    ("policy-0", "backward", 8),
    ("critic-0", "backward", 8),
    ("driver", "wait", 1),
    ("driver", "train", 1),
]


def soak(seed: int, strikes: int, iterations: int, max_staleness: int = 0) -> Case:
    """Kills at random, one after the other; a reward that is easily learned.

    The loop waits for an engine's successor, which takes longer to start than all iterations: else most would come too
    late to be killed.
    """
    draw = random.Random(seed)
    events: list[Event] = []
    before = None
    for number in range(strikes):
        actor, state, often = draw.choice(STRIKES)
        name, count = f"{number}", draw.randint(1, 2 * often)
        events.append(killed(actor, state, count, name, after=before))
        before = name
        if actor.startswith("rollout"):
            before = f"{name} up"
            events.append(Event(before, actor, "up", action="mark", after=name))
            events.append(Event(f"{name} held", "driver", "iteration", 1, action="hold", until=before, after=name))
    changes = {
        "ppo": {
            "iterations": iterations,
            "prompts_per_iteration": 16,
            "epochs": 2,
            "minibatches": 4,
            "kl_coef": 0.0,
            "max_staleness": max_staleness,
        },
        "reward": {"models": [], "functions": [{"path": "reward_functions:low_tokens"}]},
        "critic": {"cpus": 0.25, "init": "policy"},
    }
    ahead = f", sampling {max_staleness} ahead" if max_staleness else ""
    return Case(
        f"soak-{seed}{'-ahead' if max_staleness else ''}",
        f"{strikes} kills at random over {iterations} iterations{ahead}",
        tuple(events),
        changes,
        starts=1 + sum(event.actor == "driver" and event.action == "kill" for event in events),
        equal=not max_staleness,
        reward_within=0.1,
    )


SOAKS = [soak(seed=4, strikes=6, iterations=20), soak(seed=8, strikes=6, iterations=20, max_staleness=1)]
CASES = [*ENGINES, *SCORERS, *TRAINERS, *DRIVERS, *NODES, *SURROUNDINGS, ONE_AFTER_ANOTHER, *SOAKS]
NEED_ROOT = [case for case in CASES if case.name.startswith(("network-", "disk-full")) and case.around is not None]
