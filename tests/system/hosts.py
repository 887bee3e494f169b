"""Several hosts on one machine: namespaces with addresses, links and shared memory of their own, a raylet in each.

    python tests/system/hosts.py OUT.json '{"engines": 2}'

The second argument holds keys of `rollout`, as JSON. Needs root and `ip`. Submits a PPO job over HTTP from outside:
ranks of the policy on two hosts, engines on two others, reference, reward and critic on the head. Collectives and
weights cross the links. Writes what was found, and leaves neither process nor namespace behind.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

import requests

from rlhf_ray.config import dump_config

BRIDGE = "rlhfbr"
OUTSIDE = "10.77.0.254"
ROLES = {"head": "head", "trainer-a": "trainer", "trainer-b": "trainer", "rollout-a": "rollout", "rollout-b": "rollout"}
HEAD = "10.77.0.1"  # the first host
# Raylets that share a session's folder take each other's sockets.
PRIVATE = 'mkdir -p "$1" "$2"; mount --bind "$1" "$2"; mount -t tmpfs none /dev/shm; shift 2; exec "$@"'
DASHBOARD = f"http://{HEAD}:8265"


def link(number: int) -> str:
    """The bridge's end of a host's link; the hosts are counted from 0."""
    return f"rlhf{number}"


def run(*command: str, **options: Any) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, **options).stdout


def address_of(number: int) -> str:
    return f"10.77.0.{1 + number}"


@contextmanager
def network(names: Iterable[str]) -> Iterator[None]:
    """A bridge, and a namespace for each host with one link to it."""
    made = []
    try:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for number, name in enumerate(names):
            run("ip", "netns", "add", name)
            made.append(name)
            run("ip", "link", "add", link(number), "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", link(number), "master", BRIDGE, "up")
            inside = ("ip", "-n", name)
            run(*inside, "addr", "add", f"{address_of(number)}/24", "dev", "eth0")
            run(*inside, "link", "set", "eth0", "up")
            run(*inside, "link", "set", "lo", "up")
        yield
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=30)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False, timeout=30)


@contextmanager
def cluster(folder: Path, roles: dict[str, str], **variables: str) -> Iterator[list[int]]:
    """Ray on every host, the head first, with such variables; yields their processes when all have joined."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path} | variables
    hosts: list[subprocess.Popen] = []
    try:
        for number, (name, role) in enumerate(roles.items()):
            # `ip` gives every command a view of the file system of its own.
            command = ["ip", "netns", "exec", name, "sh", "-ec", PRIVATE, "sh", f"{folder}/ray-{name}", f"{folder}/ray"]
            command += [str(Path(sys.executable).parent / "ray"), "start", "--block"]
            command += [f"--node-ip-address={address_of(number)}", "--num-cpus=2", f"--labels=name={name},role={role}"]
            if name == "head":
                command += ["--head", "--port=6379", "--dashboard-host=0.0.0.0", f"--temp-dir={folder}/ray"]
            else:
                command += [f"--address={HEAD}:6379"]
            command += [f"--object-store-memory={100 * 2**20}"]
            log = (folder / f"{name}.log").open("w")
            hosts.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder)
            )
            if name == "head":
                await_page(f"{DASHBOARD}/api/version")
        await_hosts(len(roles))
        yield [host.pid for host in hosts]
    finally:
        for host in reversed(hosts):
            host.send_signal(signal.SIGTERM)
        for host in hosts:
            try:
                host.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(host.pid, signal.SIGKILL)
        # What a raylet left behind lives in its namespace.
        for name in roles:
            for pid in run("ip", "netns", "pids", name).split():
                os.kill(int(pid), signal.SIGKILL)


def await_page(url: str) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            requests.get(url, timeout=2)
            return
        except requests.RequestException:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.5)


def await_hosts(count: int) -> None:
    from ray.util.state import list_nodes
    from ray.util.state.exception import ServerUnavailable

    deadline = time.monotonic() + 180
    joined = 0
    while joined < count:
        assert time.monotonic() < deadline, f"{joined} of {count} hosts have joined"
        time.sleep(1)
        with suppress(requests.RequestException, ServerUnavailable):  # the dashboard still starts
            joined = len(list_nodes(address=DASHBOARD, filters=[("state", "=", "ALIVE")]))


def crossed(name: str) -> int:
    """Bytes that came in over the host's link."""
    return int(json.loads(run("ip", "-n", name, "-s", "-j", "link", "show", "eth0"))[0]["stats64"]["rx"]["bytes"])


def configuration(folder: Path, engines: dict[str, int]) -> Path:
    from ppo_runs import make_inputs

    config = make_inputs(folder).config(
        "run",
        policy={"processes": 2},
        rollout=engines,
        placement={
            "labels": {
                **{group: {"role": "head"} for group in ("reference", "reward", "critic")},
                "policy": {"role": "trainer"},
                "rollout": {"role": "rollout"},
            },
            "spread": ["policy", "rollout"],
        },
    )
    (folder / "job").mkdir()
    file = folder / "job" / "job.yaml"
    file.write_text(dump_config(config))
    return file


def main(out: Path, engines: dict[str, int]) -> None:
    from ray.util.state import list_actors, list_nodes

    folder = Path(tempfile.mkdtemp(prefix="hosts", dir="/tmp"))
    try:
        with network(ROLES), cluster(folder, ROLES):
            file = configuration(folder, engines)
            before = {name: crossed(name) for name in ROLES}
            command = [sys.executable, "-m", "rlhf_ray", "submit", str(file), "--address", DASHBOARD, "--name", "hosts"]
            job = subprocess.run(
                command, cwd=file.parent, capture_output=True, text=True, timeout=540, check=False, env=os.environ
            )
            assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-4000:]
            names = {node.node_id: node.labels["name"] for node in list_nodes(address=DASHBOARD, detail=True)}
            actors = {actor.name: names[actor.node_id] for actor in list_actors(address=DASHBOARD) if actor.name}
            found = {
                "exit_code": job.returncode,
                "output": job.stdout[-4000:] + job.stderr[-4000:],
                "actors": {name: host for name, host in actors.items() if not name.startswith("_")},
                "bytes": {name: crossed(name) - before[name] for name in ROLES},
                "metrics": [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()],
            }
            out.write_text(json.dumps(found))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    # The cluster asks for a token, as one that is reached over a network should. Ray reads this as it is imported,
    # which is later.
    for variable in [variable for variable in os.environ if variable.startswith("RAY_")]:
        del os.environ[variable]
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
