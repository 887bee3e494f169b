"""What each kind of failure costs a run: how soon it is noticed and made up for, and what is done again.

    python -m benchmarks.chaos --out benchmarks/results/chaos.json                # every case once
    python -m benchmarks.chaos --runs 3 --only engine-generating --only policy-backward --out FILE

The cases are those of `tests/chaos/chaos_cases.py`: PPO runs of tiny models with the real engines, each beside an
undisturbed one. A result is written after each case, in place of an older one of the same case in the file. Exit code
1 where something is not as it should be. Cases with a disk or hosts of their own need root.
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[1] / "tests" / name) for name in ("unit", "system", "chaos"))

from chaos_cases import CASES
from chaos_runs import Runs, late

from rlhf_ray.bench.report import circumstances, write

# What is kept of a run.
KEPT = ("exit_codes", "loop_s", "undisturbed_s", "lost_s", "iterations_again", "responses_again", "events", "equal")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1, help="of each case")
    parser.add_argument(
        "--only", action="append", choices=[case.name for case in CASES], help="this case; may be repeated"
    )
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--folder", type=Path, help="keeps what the runs write; it must be empty")
    arguments = parser.parse_args()
    about = circumstances([]) | {
        "cores": os.cpu_count(),
        "command": f"python -m benchmarks.chaos --runs {arguments.runs}",
    }
    del about["hardware"]
    wrong = 0
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos")))
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"--folder {folder} is not empty: give another, or empty it")
        runs = Runs(folder)
        for case in CASES:
            if arguments.only and case.name not in arguments.only:
                continue
            found = []
            for _ in range(arguments.runs):
                made = runs.run(case)
                made["problems"] += late(case, made)
                found.append(_kept(made, folder))
                print(_line(case.name, found[-1]), flush=True)
                wrong += bool(found[-1]["problems"])
            if arguments.out:
                row = {"case": case.name, "happens": case.happens, "equal": case.equal, "runs": found, **about}
                _add(arguments.out, row)
    return int(wrong > 0)


def _kept(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run's result as it is stored, without the folder that it was in."""
    kept = {name: found[name] for name in KEPT} | {"rewards": found["rewards"], "problems": found["problems"]}
    for event in kept["events"]:
        event.pop("time", None)
    return json.loads(json.dumps(kept).replace(f"{folder}/", ""))


def _line(name: str, found: dict[str, Any]) -> str:
    said = [f"{name}: lost {found['lost_s']:.1f} s, {found['iterations_again']} iterations again"]
    for event in found["events"]:
        times = [f"{what} {event[key]:.1f} s" for what, key in TIMES if key in event]
        said.append(f"  {event['victim']} in `{event['state']}`: {', '.join(times)}")
    return "\n".join([*said, *(f"  PROBLEM {one}" for one in found["problems"])])


TIMES = (
    ("noticed after", "noticed_s"),
    ("at work again after", "recovered_s"),
    ("next iteration after", "next_iteration_s"),
)


def _add(path: Path, row: dict[str, Any]) -> None:
    """Put a case's result into the file, in the order of the cases."""
    report = json.loads(path.read_text()) if path.is_file() else {"benchmark": "chaos", "cases": []}
    of_case = {one["case"]: one for one in report["cases"]} | {row["case"]: row}
    report["cases"] = [of_case[case.name] for case in CASES if case.name in of_case]
    write(path, report)


if __name__ == "__main__":
    sys.exit(main())
