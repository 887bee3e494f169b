"""Measures, on random weights and in less than ten minutes, what a machine with GPUs has and one without has not.

    python benchmarks/gpu/run.py [--out benchmarks/results/gpu_NAME.json] [--cpu]

Rollout with and without CUDA graphs beside vLLM alone; an iteration of PPO beside the bare work, its groups on one GPU
in turns or apart; weight transfers by CUDA IPC and NCCL beside a copy on the device; a tensor-parallel engine; training
with packed_sdpa, with flash attention and with compiled layers. What a case needs and the machine does not have is said
in its place. `--cpu` runs the cases that a CPU can, with tiny models, to show that they work.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cases import CASES, MODEL, TINY, TOTAL_S, Case, config_of, headline, obstacle, time_limit
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_ray.bench import report
from rlhf_ray.bench.iteration import write_models
from rlhf_ray.placement.inventory import this_machine

# For a case that was asked to end, before it is killed.
GRACE_S = 5.0
# Lines of a case's errors that are shown where it fails.
ERROR_LINES = 30


def circumstances() -> dict[str, Any]:
    """The machine and its GPUs."""
    found = report.circumstances(this_machine()) | {"command": shlex.join(["python", *sys.argv])}
    tool = shutil.which("nvidia-smi")
    query = ["--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpus = subprocess.run([tool, *query], capture_output=True, text=True, check=False).stdout if tool else ""
    return found | {"gpus": gpus.splitlines()}


def split(models: Path, *, cpu: bool) -> tuple[dict[str, dict[str, Any]], list[Case]]:
    """A row for each case, with why it is skipped where it is; and the cases that are not."""
    (node,) = this_machine()
    flash = find_spec("flash_attn") is not None
    rows: dict[str, dict[str, Any]] = {}
    able = []
    for case in CASES:
        if cpu:
            why = "needs a GPU" if case.cpu is None else None
        else:
            config = config_of(case, models, 1, cpu=False)
            why = obstacle(case, config, node.gpus, node.gpu_memory_gib, flash=flash)
        rows[case.name] = {"name": case.name, "state": "skipped", "why": why or ""}
        able += [] if why else [case]
    return rows, able


def run(case: Case, models: Path, limit_s: float, *, cpu: bool) -> dict[str, Any]:
    """Measure a case within its limit: its state, seconds and result."""
    out, errors = models / "result.json", models / "errors.txt"
    out.unlink(missing_ok=True)
    command = [sys.executable, Path(__file__).with_name("measure.py"), case.name, "--models", models, "--out", out]
    started = time.monotonic()
    with errors.open("w") as file:
        # A session of its own, so that its processes can be ended together.
        child = subprocess.Popen([*command, *["--cpu"] * cpu], stderr=file, start_new_session=True)
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(child)
    seconds = time.monotonic() - started
    lines = errors.read_text(errors="replace").splitlines()
    if code == 0:
        result = json.loads(out.read_text())
        name, ratio = headline(case, result)
        return {"state": "measured", "why": f"{name}: {report.said(ratio)}", "seconds": seconds, "result": result}
    print("\n".join(lines[-ERROR_LINES:]), file=sys.stderr)
    if code is None:
        return {"state": "stopped", "why": f"not done within its {limit_s:.0f} s", "seconds": seconds}
    return {"state": "failed", "why": lines[-1] if lines else f"exit code {code}", "seconds": seconds}


def end(child: subprocess.Popen[bytes]) -> None:
    """End a case that still runs, and what it started."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def summary(rows: list[dict[str, Any]]) -> Table:
    """A line for each case."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("case", "state", "seconds", "median (least to largest), or why not"):
        found.add_column(name)
    for row in rows:
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        found.add_row(row["name"], row["state"], seconds, escape(row["why"]))
    return found


def main() -> None:
    """The command line; ends with 1 where a case failed or ran out of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--cpu", action="store_true", help="run what a CPU can, with tiny models")
    arguments = parser.parse_args()
    deadline = time.monotonic() + TOTAL_S
    # What asks this process to end, ends the case under way, too, which is in a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found = circumstances()
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-gpu-") as folder:
        models = Path(folder)
        write_models(models, TINY if arguments.cpu else MODEL)
        rows, able = split(models, cpu=arguments.cpu)
        for index, case in enumerate(able):
            limit = time_limit(deadline - time.monotonic(), able[index:])
            print(f"\n{case.name} (up to {limit:.0f} s)", flush=True)
            rows[case.name] |= run(case, models, limit, cpu=arguments.cpu)
    ordered = [rows[case.name] for case in CASES]
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print("", summary(ordered))
    if arguments.out is not None:
        report.write(arguments.out, {"benchmark": "gpu", **found, "cpu": arguments.cpu, "cases": ordered})
    if any(row["state"] in ("failed", "stopped") for row in ordered):
        sys.exit(1)


if __name__ == "__main__":
    main()
