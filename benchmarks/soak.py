"""Whether memory grows: PPO of the demonstration for many iterations, with the memory of each process as it goes.

    python benchmarks/soak.py                      # data, SFT, reward model, then 200 iterations
    python benchmarks/soak.py --iterations 400

Data, SFT and reward model are made once and kept in the folder. What is measured of a process is its resident memory,
with that of its children, once an iteration at the most; growth is the slope of a line through the second half.
"""

import argparse
import json
import threading
from pathlib import Path
from statistics import linear_regression
from typing import Any

import psutil

from rlhf_ray.bench.report import circumstances
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.demo.data import write_demo_data
from rlhf_ray.demo.run import demo_config
from rlhf_ray.placement.groups import inventory
from rlhf_ray.runtime.cluster import connection
from rlhf_ray.stages.pipeline import run_pipeline
from rlhf_ray.stages.ppo import train_ppo
from rlhf_ray.tracking.activity import NOW, TRACE
from rlhf_ray.tracking.rundir import write_text

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"
RESULT = ROOT / "benchmarks" / "results" / "soak.json"
SAMPLE_EVERY_S = 2.0
MIB = 2**20

Samples = dict[str, dict[int, float]]  # process -> iteration -> MiB


def resident_mib(process: int) -> float:
    """Resident memory of a process and its children, in MiB; 0 of one that is gone."""
    try:
        root = psutil.Process(process)
        return sum(one.memory_info().rss for one in (root, *root.children(recursive=True))) / MIB
    except psutil.NoSuchProcess:
        return 0.0


def sample(run: Path, samples: Samples) -> None:
    """Add what each process of the run takes now, under the number of iterations that are done."""
    metrics = run / "metrics.jsonl"
    done = len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.is_file() else 0
    for file in (run / TRACE).glob(f"*{NOW}"):
        name = file.name.removesuffix(NOW)
        told = json.loads(file.read_text(encoding="utf-8"))
        # The driver's children are all of a local Ray.
        takes = psutil.Process().memory_info().rss / MIB if name == "driver" else resident_mib(told["process"])
        if takes:
            samples.setdefault(name, {})[done] = takes


def watch(run: Path, samples: Samples, ended: threading.Event) -> None:
    """Sample until the run has ended."""
    while not ended.wait(SAMPLE_EVERY_S):
        try:
            sample(run, samples)
        except (OSError, ValueError):  # a file that is just being replaced
            continue


def summarize(samples: dict[int, float]) -> dict[str, Any]:
    """Memory of one process at each tenth of the iterations, and its growth in 100 of those of the second half."""
    points = sorted(samples.items())
    last = points[-1][0]
    tenths = [next(takes for done, takes in points if done >= last * tenth / 10) for tenth in range(1, 11)]
    late = [(done, takes) for done, takes in points if done >= last / 2]
    slope = linear_regression(*zip(*late, strict=True)).slope
    return {"tenths_mib": [round(takes, 1) for takes in tenths], "growth_mib_per_100": 100 * slope}


def main() -> None:
    """Run, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200, help="of PPO (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="of data and runs (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="the result (%(default)s)")
    options = parser.parse_args()
    files = write_demo_data(options.folder / "data", 0)
    base = demo_config(CONFIG, options.folder, 0, files, few_labels=False)
    run = options.folder / f"ppo-{options.iterations}"
    samples: Samples = {}
    with connection(base.run.ray_address):
        around = circumstances(inventory()) | {
            "command": f"python benchmarks/soak.py --iterations {options.iterations}"
        }
        models = run_pipeline(base.model_copy(update={"stages": ["sft", "reward"]}))
        values: dict[str, Any] = base.stage_config("ppo", {name: str(models[name]) for name in models}).model_dump()
        values["run"] |= {"dir": str(run)}
        values["ppo"] |= {"iterations": options.iterations}
        ended = threading.Event()
        watcher = threading.Thread(target=watch, args=(run, samples, ended))
        watcher.start()
        try:
            train_ppo(PPOConfig.model_validate(values))
        finally:
            ended.set()
            watcher.join()
    rows = {name: summarize(of_process) for name, of_process in sorted(samples.items())}
    for name, row in rows.items():
        print(f"{name}: {row['tenths_mib']} MiB, growth {row['growth_mib_per_100']:.1f} in 100 iterations")
    result = {"benchmark": "soak", **around, "iterations": options.iterations, "processes": rows}
    write_text(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
