"""Is the time of an iteration that `rlhf-ray plan --throughput` estimates the time that it takes?

    python benchmarks/throughput.py --out benchmarks/results/throughput.json

Measures the speeds of one run of each of two sizes of model (`CELLS`), then other runs (`RUNS`), of which only the
configuration and the lengths are known to the estimate. About ten minutes on two cores. `--again FILE` computes the
estimates of a stored result anew and measures nothing.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.bench.iteration import WORKLOADS, IterationWorkload, built_in_config, run_system, this_machine
from rlhf_ray.bench.random_models import SMALL_LLAMA
from rlhf_ray.bench.report import without_folder
from rlhf_ray.bench.workload import Fixed
from rlhf_ray.config.load import from_dict
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.placement.cells import Cell, Cells
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.layout import Layout
from rlhf_ray.placement.shapes import ModelShape, find_shape
from rlhf_ray.placement.speeds import Samples
from rlhf_ray.placement.throughput import throughput

# 25 million parameters, between W1 and W3.
MIDDLE_LLAMA = SMALL_LLAMA | {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1376}
ALL = WORKLOADS | {"middle": IterationWorkload(MIDDLE_LLAMA, 32, 32, Fixed(128))}


@dataclass(frozen=True)
class Run:
    """What is run.

    Attributes:
        workload: a key of `ALL`.
        iterations: that count, after one that warms up.
        overrides: of its configuration.
    """

    workload: str
    iterations: int
    overrides: list[str] = field(default_factory=list)


# The engine on a core of its own, as sampling ahead of training wants it.
APART = "placement.cores={rollout: [0], policy: [1], critic: [1], reference: [1], reward: [1]}"
CELLS = [Run("w1", 3), Run("middle", 2)]
RUNS = [
    Run("w2", 3),
    Run("w3", 2),
    Run("w1", 4, ["ppo.max_staleness=1", "rollout.cpus=1", APART]),
    Run("w2", 3, ["ppo.minibatches=2", "training.micro_batch_tokens=1024", "reference.micro_batch_tokens=2048"]),
]


def measure(run: Run) -> dict[str, Any]:
    """Run it; what the estimate may know of it, and what it took."""
    workload = ALL[run.workload]
    requests = workload.requests(seed=0)
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-bench-") as folder:
        config = built_in_config(workload, "fp32", Path(folder), run.iterations + 1, run.overrides)
        with this_machine(config):
            rows, cells = run_system(config, requests)
        shape = find_shape(config.policy.path)
    assert shape is not None
    return {
        **asdict(run),
        "config": without_folder(config, folder),
        "shape": asdict(shape),
        "prompts": [len(prompt) for prompt in requests.prompts],
        "responses": requests.lengths,
        # Until sampling is as far ahead as it may be, iterations are others.
        "measured_s": [row["iteration"] for row in rows[config.ppo.max_staleness :]],
        "cells": [asdict(cell) for cell in cells],
    }


def estimated(row: dict[str, Any], cells: list[dict[str, Any]], cores: float) -> float:
    """Seconds an iteration of a measured run, from cells alone.

    Args:
        row: of `measure`.
        cells: of other runs.
        cores: of the machine.
    """
    config = from_dict(row["config"], "ppo")
    assert isinstance(config, PPOConfig)
    samples = Samples(row["prompts"], row["responses"])
    known = Cells([Cell(**cell) for cell in cells], "the measured runs")
    nodes = [Node(name="here", cpus=cores)]
    shape = ModelShape(**row["shape"])
    return throughput(config, Layout([], {}), nodes, samples, known, lambda _: shape).estimate.iteration_s


def compare(report: dict[str, Any]) -> dict[str, Any]:
    """The report with estimates, and the largest deviation among the runs whose speeds were not known to them."""
    cores = report["hardware"][0]["cpus"]
    for row in [*report["measured"], *report["foretold"]]:
        row["estimated_s"] = estimated(row, report["cells"], cores)
        row["ratio"] = row["estimated_s"] / statistics.median(row["measured_s"])
    report["largest_deviation"] = max(abs(row["ratio"] - 1) for row in report["foretold"])
    return report


def main() -> None:
    """Measure, estimate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--again", type=Path, help="a stored result whose estimates are computed anew")
    options = parser.parse_args()
    if options.again:
        report = compare(json.loads(options.again.read_text()))
    else:
        from rlhf_ray.bench.report import circumstances
        from rlhf_ray.placement.inventory import this_machine

        found = circumstances(this_machine())
        measured = [measure(run) for run in CELLS]
        cells = [cell for row in measured for cell in row.pop("cells")]
        foretold = [{key: value for key, value in measure(run).items() if key != "cells"} for run in RUNS]
        command = "python benchmarks/throughput.py --out benchmarks/results/throughput.json"
        report = {"benchmark": "throughput", **found, "command": command, "cells": cells}
        report = compare({**report, "measured": measured, "foretold": foretold})
    for row in [*report["measured"], *report["foretold"]]:
        took = statistics.median(row["measured_s"])
        what = " ".join([row["workload"], *row["overrides"]])
        print(f"{what}: {took:.2f} s measured, {row['estimated_s']:.2f} s estimated, ratio {row['ratio']:.2f}")
    print(f"largest deviation of what was foretold: {report['largest_deviation']:.1%}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
