"""An iteration of PPO here and with TRL's trainer: the same workload on the same cores, in turns.

    python benchmarks/trl_ppo.py --try-settings --out benchmarks/results/trl_settings.json
    python benchmarks/trl_ppo.py --out benchmarks/results/trl_ppo.json

TRL runs in an environment of its own, which the first call makes (`--environment`), with the versions of torch and
transformers that are installed here. It uses all cores, and the fastest of the settings that the first command tried.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_ray.bench import report
from rlhf_ray.bench.iteration import WORKLOADS, built_in_config, run_system, this_machine
from rlhf_ray.bench.rollout import spread
from rlhf_ray.placement.inventory import Node
from rlhf_ray.runtime.cluster import KEPT_MEMORY

HERE = Path(__file__).resolve().parent
SETTINGS = HERE / "results" / "trl_settings.json"
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
WORKLOAD = "w1"
CORES = len(os.sched_getaffinity(0))
# Of TRL: responses that are sampled and scored at a time, and those of a micro-batch, the one to begin with first.
ROLLOUT_BATCHES = (64, 32)
MICRO_BATCHES = (16, 64, 32, 8)


def make_environment(folder: Path) -> Path:
    """A virtual environment with TRL, unless the folder is one already; returns its interpreter."""
    python, complete = folder / "bin" / "python", folder / "complete"
    if complete.is_file():
        return python
    print(f"installing TRL into {folder}", flush=True)
    venv.create(folder, with_pip=True, symlinks=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch, transformers = (f"{name}=={metadata.version(name)}" for name in ("torch", "transformers"))
    # From where pip is configured to look, and if it is not there, PyTorch's own index of builds for CPUs.
    if subprocess.run([*install, torch], capture_output=True).returncode:
        subprocess.run([*install, "--extra-index-url", CPU_TORCH, torch], check=True)
    subprocess.run([*install, "trl==1.10.*", torch, transformers, "accelerate", "datasets"], check=True)
    complete.touch()
    return python


def run_trl(python: Path, iterations: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What `trl_side.py` finds in a process of its own.

    Args:
        python: of TRL's environment.
        iterations: the first warms up.
        settings: "rollout_batch" and "micro_batch", and whether glibc is set as in the processes of a run here
            ("kept_memory").

    Raises:
        CalledProcessError: TRL failed, or did other work; what it said was printed.
    """
    workload = WORKLOADS[WORKLOAD]
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-trl-") as name:
        folder = Path(name)
        config = built_in_config(workload, "fp32", folder, iterations, [])
        job = {
            "folder": name,
            "policy": config.policy.path,
            "reward": config.critic.init,
            "prompts": workload.requests(seed=0).prompts,
            "response_tokens": config.rollout.max_new_tokens,
            "kl_coef": config.ppo.kl_coef,
            "iterations": iterations,
            "threads": CORES,
            "rollout_batch": settings["rollout_batch"],
            "micro_batch": settings["micro_batch"],
        }
        (folder / "job.json").write_text(json.dumps(job))
        command = [python, HERE / "trl_side.py", folder / "job.json", folder / "found.json"]
        variables = {"OMP_NUM_THREADS": str(CORES)} | (KEPT_MEMORY if settings["kept_memory"] else {})
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
            done.check_returncode()
        return json.loads((folder / "found.json").read_text())


def run_ours(iterations: int) -> list[float]:
    """Seconds of every iteration of this system but the first."""
    workload = WORKLOADS[WORKLOAD]
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-bench-") as folder:
        config = built_in_config(workload, "fp32", Path(folder), iterations, [])
        with this_machine(config):
            rows, _ = run_system(config, workload.requests(seed=0))
            return [row["end_to_end"] for row in rows]


def try_settings(python: Path, iterations: int) -> dict[str, Any]:
    """TRL's seconds an iteration: with several batches, with several micro-batches and the fastest batch, and with
    memory kept and the fastest of all."""
    rows: list[dict[str, Any]] = []

    def measure(**settings: Any) -> None:
        found = run_trl(python, iterations, settings)
        seconds = {name: spread(found[name]) for name in ("iteration_s", "generate_s")}
        rows.append(settings | {name: found[name] for name in ("versions", "cores_used")} | seconds)
        said = report.said(seconds["iteration_s"])
        print(f"{settings}: {said} s an iteration, {found['cores_used']:.2f} cores at work", flush=True)

    for batch in ROLLOUT_BATCHES:
        measure(rollout_batch=batch, micro_batch=MICRO_BATCHES[0], kept_memory=False)
    batch = fastest(rows)["rollout_batch"]
    for micro_batch in MICRO_BATCHES[1:]:
        measure(rollout_batch=batch, micro_batch=micro_batch, kept_memory=False)
    measure(rollout_batch=batch, micro_batch=fastest(rows)["micro_batch"], kept_memory=True)
    return {"benchmark": "peer settings", "peer": "trl", "rows": rows}


def fastest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings with the least seconds an iteration."""
    return min(rows, key=lambda row: row["iteration_s"]["median"])


def compare(python: Path, blocks: int, iterations: int) -> dict[str, Any]:
    """Blocks of iterations of TRL and of this system in turns.

    Raises:
        SystemExit: TRL's settings were not tried.
    """
    if not SETTINGS.is_file():
        raise SystemExit(f"{SETTINGS} is not there, which says TRL's fastest settings; run with --try-settings before")
    best = fastest(json.loads(SETTINGS.read_text())["rows"])
    settings = {name: best[name] for name in ("rollout_batch", "micro_batch", "kept_memory")}
    theirs: list[float] = []
    generate: list[float] = []
    ours: list[float] = []
    ratios: list[float] = []
    cores: list[float] = []
    for block in range(blocks):
        found = run_trl(python, iterations, settings)
        seconds = run_ours(iterations)
        ratio = statistics.median(seconds) / statistics.median(found["iteration_s"])
        print(
            f"block {block + 1}: TRL {report.said(spread(found['iteration_s']))} s on {found['cores_used']:.2f} cores, "
            f"here {report.said(spread(seconds))} s: {ratio:.2f}",
            flush=True,
        )
        cores.append(found["cores_used"])
        theirs += found["iteration_s"]
        generate += found["generate_s"]
        ours += seconds
        ratios.append(ratio)
    return {
        "benchmark": "peers",
        "peer": "trl",
        "peer_versions": found["versions"],
        "peer_settings": settings,
        "blocks": blocks,
        "peer_s": spread(theirs),
        "peer_generate_s": spread(generate),
        "peer_cores_used": spread(cores),
        "iteration_s": spread(ours),
        "share_of_peer": spread(ratios),
    }


def main() -> None:
    """Compare, or try TRL's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--environment", type=Path, default=HERE.parent / "build" / "trl", help="of TRL (%(default)s)")
    parser.add_argument("--try-settings", action="store_true", help="measure TRL alone, with each of several settings")
    parser.add_argument("--blocks", type=int, default=3, help="of iterations, for each side (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="iterations of a block, after one that warms up")
    options = parser.parse_args()
    python = make_environment(options.environment)
    circumstances = report.circumstances([Node(name="this", cpus=CORES)])
    circumstances["command"] = shlex.join(["python", "benchmarks/trl_ppo.py", *sys.argv[1:]])
    settings = {"workload": WORKLOAD, "dtype": "fp32", "repeats": options.repeats}
    if options.try_settings:
        found = try_settings(python, options.repeats + 1)
    else:
        found = compare(python, options.blocks, options.repeats + 1)
        print(f"here / TRL: {report.said(found['share_of_peer'])}")
    if options.out:
        report.write(options.out, {"benchmark": found.pop("benchmark"), **circumstances, **settings, **found})


if __name__ == "__main__":
    main()
