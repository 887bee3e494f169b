"""Is a new result of `rlhf-ray bench` as good as the stored one?

    rlhf-ray bench iteration --workload w1 --out new.json
    python benchmarks/compare.py new.json

Finds the stored result of the same measurement in `benchmarks/results`, prints each ratio of both, and fails where a
new one is worse by more than the tolerance. Ratios alone are compared, each taken in one run on one machine: seconds of
two machines, or of two days, say nothing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
TOLERANCE = 0.15
# What must be equal for two results to be of the same measurement.
SETTINGS = ("benchmark", "peer", "workload", "dtype", "max_staleness", "parameters", "engines", "response_tokens")
SETTINGS += ("requests",)
# The ratio of each kind of measurement, and whether more of it is better.
RATIOS = {
    "iteration": ("share_of_bare", False),
    "transfer": ("transfer_per_copy", False),
    "packing": ("share_of_equal", True),
    "peers": ("share_of_peer", False),
    "rollout": ("share_of_bare", True),
}
CELL = ("engines", "tensor_parallel", "max_concurrency", "prompt_tokens", "response_tokens")


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """Each ratio of a result by name, turned so that less is better."""
    if report["benchmark"] == "scaling":
        # What a response costs with the most engines, by what it costs with the fewest.
        costs = [row["driver_cpu_ms_per_trajectory"] for row in report["rows"]]
        return {f"{report['rows'][-1]['engines']} engines / {report['rows'][0]['engines']}": costs[-1] / costs[0]}
    name, more_is_better = RATIOS[report["benchmark"]]
    if report.get("max_staleness"):
        name = "share_of_longer"
    found = {}
    for row in report.get("rows", [report]):
        cell = " ".join(f"{key}={row[key]}" for key in CELL if "rows" in report)
        ratio = row[name]["median"]
        found[f"{name} {cell}".strip()] = 1 / ratio if more_is_better else ratio
    return found


def stored(report: dict[str, Any], folder: Path) -> Path:
    """The file with the result of the same measurement.

    Raises:
        SystemExit: there is none.
    """
    wanted = {key: report.get(key) for key in SETTINGS}
    for path in sorted(folder.glob("*.json")):
        there = json.loads(path.read_text())
        if {key: there.get(key) for key in SETTINGS} == wanted:
            return path
    said = ", ".join(f"{key} {value}" for key, value in wanted.items() if value is not None)
    raise SystemExit(f"{folder} holds no result of this measurement ({said}); name the file to compare with")


def main() -> None:
    """Compare two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path, help="result of `rlhf-ray bench ... --out`")
    parser.add_argument("old", type=Path, nargs="?", help="the one to compare with; without it, the stored one")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="how much worse is accepted (%(default)s)")
    options = parser.parse_args()
    new = json.loads(options.new.read_text())
    old_path = options.old or stored(new, RESULTS)
    before, now = ratios(json.loads(old_path.read_text())), ratios(new)
    table = Table("ratio", "before", "now", "worse by", box=None, title=f"{options.new} beside {old_path.name}")
    worst = 0.0
    for name, value in now.items():
        if name not in before:
            table.add_row(name, "none", f"{value:.3f}", "")
            continue
        worse = value / before[name] - 1
        worst = max(worst, worse)
        table.add_row(name, f"{before[name]:.3f}", f"{value:.3f}", f"{worse:+.1%}")
    Console(highlight=False, width=120).print(table)
    if not now.keys() & before.keys():
        raise SystemExit("the two have no measurement in common")
    if worst > options.tolerance:
        raise SystemExit(f"worse by {worst:.1%}, more than {options.tolerance:.0%}")


if __name__ == "__main__":
    main()
