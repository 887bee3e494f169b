"""Jobs on a real cluster that asks for a token: submitted, followed, stopped, continued, refused."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.system

TOKEN = "a-token-of-the-tests-alone-1234"
SECRET = "a-secret-value-5678"
CONFIG = """\
# rlhf-ray sft {name}
run: {{dir: {run_dir}, timeout_s: 60}}
data: {{path: {data}, max_tokens: 64}}
model:
  chat_template: default
  scratch: {{hidden_size: 32, num_layers: 1, num_heads: 1, num_kv_heads: 1, vocab_size: 300, max_length: 64}}
group: {{cpus: 1}}
sft: {{batch_size: 1, epochs: 250}}
"""
DEMOS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}] * 4


class Cluster:
    """The address of a cluster, and its users' command line in a folder of theirs."""

    def __init__(self, folder: Path, environment: dict[str, str], address: str, head: str):
        self.folder = folder
        self.environment = environment
        self.address = address
        self.head = head  # what drivers connect to; `address` is the dashboard's
        self.started: list[subprocess.Popen] = []

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_ray", *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def call(self, *arguments: str, address: str | None = None, **environment: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        process = self.start(*arguments, "--address", address or self.address, **environment)
        out, err = process.communicate(timeout=240)
        assert "Traceback" not in err, err
        assert SECRET not in out + err
        assert TOKEN not in out + err
        return process.returncode, out, err

    def job(self, name: str) -> dict[str, Any]:
        code, out, err = self.call("jobs", "--json")
        assert code == 0, err
        return {job["name"]: job for job in map(json.loads, out.splitlines())}[name]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMOS))
    for name, data in (("sft", "demos.jsonl"), ("broken", "/nowhere/demos.jsonl")):
        text = CONFIG.format(name=name, run_dir=folder / "runs" / name, data=data)
        (folder / f"{name}.yaml").write_text(text)
    (folder / ".rayignore").write_text("runs/\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        # A node finds `python` there.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    with started(folder, environment) as cluster:
        yield cluster


@contextmanager
def started(folder: Path, environment: dict[str, str], agent_port: int = 0) -> Iterator[Cluster]:
    """A cluster of one node, at ports that Ray chooses: one found free before may be another's by then.

    But for that of Ray Client, which cannot be left to it, and which several clusters may listen on.
    """
    # Not pytest's folder: the paths of Ray's sockets may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="jobs", ignore_cleanup_errors=True) as ray_folder:
        options = {
            "port": 0,
            "dashboard-port": 0,
            "dashboard-agent-listen-port": agent_port,
            "min-worker-port": 0,
            "max-worker-port": 0,
            "num-cpus": 4,
            "object-store-memory": 128 * 2**20,
            "temp-dir": ray_folder,
        }
        ray = str(Path(sys.executable).with_name("ray"))
        log = folder / "head.log"
        with log.open("w") as output:
            head = subprocess.Popen(
                [ray, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_for(lambda: "Ray runtime started" in log.read_text() and "--block" in log.read_text())
            # Ray writes the port there when the agent listens, or that it does not.
            wait_for(lambda: list(Path(ray_folder).glob("session_latest/dashboard_agent_listen_port_*")))
            dashboard = re.search(r"RAY_API_SERVER_ADDRESS='(.+?)'", log.read_text())
            assert dashboard is not None
            cluster = Cluster(folder, environment, dashboard[1], (Path(ray_folder) / "ray_current_cluster").read_text())
            yield cluster
            for process in cluster.started:
                process.kill()
        finally:
            end(head.pid)


def end(pid: int) -> None:
    """Ends a head and all that it has started."""
    head = psutil.Process(pid)
    started = [*head.children(recursive=True), head]
    head.terminate()
    _, alive = psutil.wait_procs(started, timeout=15)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_ctrl_c_leaves_a_job_running_which_stops_with_a_checkpoint_and_continues_when_submitted_again(cluster):
    run_dir = cluster.folder / "runs" / "sft"
    metrics = run_dir / "metrics.jsonl"
    submit = ["submit", "sft.yaml", "--env", "SOME_KEY"]
    waiting = cluster.start(*submit, "--name", "first", "--address", cluster.address, SOME_KEY=SECRET)
    assert waiting.stdout is not None
    waiting.stdout.readline()
    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 130, err
    assert err.startswith("submitted first\n")
    assert f"`rlhf-ray logs first --follow --address {cluster.address}`" in err
    assert "Traceback" not in out + err
    assert SECRET not in out + err

    code, out, err = cluster.call(*submit, "--name", "first", SOME_KEY=SECRET)
    assert (code, out) == (1, "")
    assert "--name: 'first' is taken" in err

    follower = cluster.start("logs", "first", "--follow", "--address", cluster.address)
    wait_for(lambda: metrics.is_file() and metrics.stat().st_size > 0)
    code, out, _ = cluster.call("stop", "first")
    assert (code, "asked to stop" in out) == (0, True)
    out, err = follower.communicate(timeout=120)
    assert follower.returncode == 143, out + err
    assert "stopped by a signal after step" in out, out
    assert list(run_dir.glob("checkpoints/step_*"))
    assert not (run_dir / "summary.json").exists()
    assert "has ended already: stopped" in cluster.call("stop", "first")[1]

    assert cluster.call(*submit, "--name", "second", "--detach", SOME_KEY=SECRET)[:2] == (0, "second\n")
    code, out, err = cluster.call("logs", "second", "--follow")
    assert code == 0, out + err
    assert f"{run_dir}/model\n" in out
    assert [json.loads(line)["step"] for line in metrics.open()] == list(range(1000))
    job = cluster.job("second")
    assert (job["status"], job["exit_code"], job["kind"], job["run_dir"]) == ("SUCCEEDED", 0, "sft", str(run_dir))
    code, out, _ = cluster.call("jobs")
    assert code == 0
    assert out.index("first") < out.index("second")


def test_a_failed_job_gives_its_exit_code_and_its_log(cluster):
    code, out, err = cluster.call("submit", "broken.yaml", "--name", "broken")
    assert code == 2, out + err
    assert "error: /nowhere/demos.jsonl does not exist" in out
    assert err == "submitted broken\nbroken failed, exit code 2\n"
    assert cluster.job("broken")["exit_code"] == 2
    code, again, _ = cluster.call("logs", "broken")
    assert (code, again) == (0, out)


def test_a_head_node_that_takes_no_jobs_is_one_error(cluster, tmp_path):
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        with started(tmp_path, cluster.environment, agent_port=port) as other:
            submitted = cluster.call("submit", "sft.yaml", address=other.address)
    assert submitted[:2] == (1, "")
    assert submitted[2].startswith(f"error: --address: the head node behind {other.address} takes no jobs")
    assert "dashboard_agent.log" in submitted[2]


@pytest.mark.parametrize(
    ("arguments", "environment", "found"),
    [
        (["submit", "sft.yaml"], {"RAY_AUTH_MODE": "disabled"}, "no access to"),
        (["jobs"], {"RAY_AUTH_TOKEN": "another-token"}, "no access to"),
        (["jobs"], {"RAY_AUTH_TOKEN": "", "HOME": "/nowhere"}, "no access to"),
        (["logs", "none"], {}, "no job at"),
    ],
)
def test_what_the_cluster_refuses_is_one_error(cluster, arguments, environment, found):
    code, out, err = cluster.call(*arguments, **environment)
    assert (code, out) == (1, ""), err
    assert err.startswith("error: "), err
    assert found in err


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        (["plan", "sft.yaml", "--address", "{head}"], "--address"),
        (["doctor", "--address", "{head}"], "--address"),
        (["sft", "sft.yaml", "run.dir=runs/refused", "run.ray_address={head}"], "run.ray_address"),
        (["bench", "rollout", "run.ray_address={head}"], "run.ray_address"),
    ],
)
@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "another-token"}, {"RAY_AUTH_TOKEN": "", "HOME": "/nowhere"}],
)
def test_drivers_that_the_cluster_refuses_get_one_error(cluster, command, asked, environment):
    process = cluster.start(*(word.format(head=cluster.head) for word in command), **environment)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, ""), err
    # A run has said before what it read.
    *_, last = err.splitlines()
    assert last.startswith(f"error: {asked}: no access to the Ray cluster at '{cluster.head}' ("), err
    assert "RAY_AUTH_TOKEN" in last
    assert "Traceback" not in err
    assert "rpc_client" not in err


# Other tests' clusters are on this machine too.
THIS_CLUSTER = """\
import sys
from ray._private import services
from rlhf_ray.cli import main
services.get_ray_address_from_environment = lambda address, folder: sys.argv[1]
main(sys.argv[2:])
"""


def test_a_cluster_found_on_this_machine_gets_the_users_token_and_another_does_not(cluster, tmp_path):
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text(TOKEN)
    environment = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH")}
    for address, code in (("auto", 0), (cluster.head, 1)):
        command = [sys.executable, "-c", THIS_CLUSTER, cluster.head, "plan", "sft.yaml", "--address", address]
        found = subprocess.run(
            command,
            cwd=cluster.folder,
            env=environment | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert found.returncode == code, found.stdout + found.stderr
        assert ("It fits." in found.stdout) == (code == 0)
        assert ("no access to" in found.stderr) == (code == 1)


def test_a_run_without_an_address_leaves_a_cluster_on_this_machine_alone(cluster):
    """Ray by itself joins the one that `ray start` made."""
    lines = (
        "import ray",
        "from rlhf_ray.runtime.cluster import connection",
        "with connection():",
        "    print(ray.cluster_resources()['object_store_memory'])",
    )
    environment = cluster.environment | {"RAY_AUTH_MODE": "disabled"}
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) > 256 * 2**20  # that of a cluster of its own, not of the fixture


def test_the_limit_is_that_of_the_installed_ray():
    from ray._private import ray_constants

    from rlhf_ray.jobs.package import UPLOAD_LIMIT_BYTES

    limits = ray_constants.DASHBOARD_CLIENT_MAX_SIZE, ray_constants.GRPC_CPP_MAX_MESSAGE_SIZE
    assert min(limits) == UPLOAD_LIMIT_BYTES
