"""Measures one case, in a process of its own that `run.py` can end.

python benchmarks/gpu/measure.py CASE --models FOLDER --out FILE [--cpu]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from cases import Case, by_name, config_of, cores, sweep, workload
from rich.console import Console

from rlhf_ray.bench import report
from rlhf_ray.bench.iteration import bench_iteration
from rlhf_ray.bench.packing import bench_packing
from rlhf_ray.bench.rollout import bench_rollout
from rlhf_ray.bench.transfer import bench_transfer
from rlhf_ray.errors import RlhfError
from rlhf_ray.runtime.cluster import own_cluster

# Iterations, transfers and optimizer steps that are measured, after one that warms up.
REPEATS = 3


def measure(case: Case, models: Path, *, cpu: bool) -> dict[str, Any]:
    """Start a cluster on this machine, measure, and print what was found as `rlhf-ray bench` does."""
    config, chosen = config_of(case, models, REPEATS + 1, cpu=cpu), workload(cpu=cpu)
    with own_cluster(cores(config)):
        if case.measure == "rollout":
            rows = list(bench_rollout(config, sweep(case, cpu=cpu)))
            Console(highlight=False, width=200).print(report.table(rows, "core" if cpu else "GPU"))
            return {"rows": rows}
        if case.measure == "iteration":
            row = bench_iteration(config, chosen)
            print(report.iteration_lines(case.name, config.training.dtype, row))
        elif case.measure == "transfer":
            row = bench_transfer(config, REPEATS)
            print(report.transfer_lines(row))
        else:
            row = bench_packing(config, chosen.prompt_tokens, chosen.response, REPEATS)
            print(report.packing_lines(row))
        return row


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    try:
        report.write(arguments.out, measure(by_name(arguments.case), arguments.models, cpu=arguments.cpu))
    except RlhfError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
