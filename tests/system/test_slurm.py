"""`cluster/slurm.sh` as a whole, with the real `ray symmetric-run`; `srun`, `scontrol` and `rlhf-ray` are stand-ins.

`symmetric-run` ends with `ray stop`, which stops every Ray process that it sees. So the script runs in a PID namespace
of its own, where it sees its own only.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "slurm.sh"
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]

# Takes the options of Slurm off and runs the rest, as on a cluster of one node.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""

SCONTROL = """#!/bin/bash
echo "scontrol $*"
"""

# Connects to the cluster it was started in, then behaves as a run does that SIGTERM stops.
RLHF_RAY = """#!{python}
import pathlib, signal, sys, time
import ray

ray.init()
print("driver", *sys.argv[1:], "on", int(ray.cluster_resources()["CPU"]), "CPU", flush=True)


def stop(number, frame):
    print("checkpoint", flush=True)
    time.sleep(1)
    sys.exit(143)


signal.signal(signal.SIGTERM, stop)
pathlib.Path("ready").touch()
time.sleep(300)
"""

# What Slurm does: it starts the script on the first node, and signals it some time before the end.
BATCH = """
bash "$0" ppo some.yaml run.dir=x &
until [[ -e ready ]]; do kill -0 $! 2>/dev/null || break; sleep 0.2; done
kill -USR1 $!
wait $!
"""


def has_namespaces() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, timeout=10).returncode == 0
    except FileNotFoundError:
        return False


def free_job_id() -> int:
    """A job whose port, as the script derives it, nobody uses."""
    for job in range(4000, 5000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20000 + job)):
                return job
    raise AssertionError("no free port from 24000 to 25000")


@pytest.mark.system
@pytest.mark.skipif(not has_namespaces(), reason="needs unshare and the right to make PID namespaces")
def test_the_script_runs_the_command_and_queues_the_job_again(tmp_path):
    project = tmp_path / "project"
    stubs = project / ".venv" / "bin"
    stubs.mkdir(parents=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "rlhf-ray": RLHF_RAY.format(python=sys.executable)}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    (stubs / "activate").write_text(f'PATH="{stubs}:{Path(sys.executable).parent}:$PATH"\n')
    # Ray's sockets lie below; a path of more than 107 characters is too long for one.
    short = Path(f"/tmp/slurm_{os.getpid()}")
    short.mkdir()
    job = free_job_id()
    result = subprocess.run(
        [*NAMESPACE, "bash", "-c", BATCH, str(SCRIPT)],
        cwd=project,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "HOME": str(tmp_path),
            "RAY_TMPDIR": str(short),
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_CPUS_ON_NODE": "3",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    output = result.stdout[-4000:]
    subprocess.run(["rm", "-rf", str(short)], check=True)
    assert "driver ppo some.yaml run.dir=x on 3 CPU" in result.stdout, output
    assert "\ncheckpoint\n" in result.stdout, output
    assert f"scontrol requeue {job}" in result.stdout, output
    assert result.returncode == 143, output
    token = tmp_path / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0
