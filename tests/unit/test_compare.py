"""`benchmarks/compare.py`: ratios of literal results."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compare.py"


def result(folder: Path, name: str, **values: Any) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return str(path)


def compare(*arguments: str) -> tuple[int, str]:
    found = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    return found.returncode, found.stdout + found.stderr


def iteration(ratio: float) -> dict[str, Any]:
    return {"benchmark": "iteration", "workload": "w1", "share_of_bare": {"median": ratio}}


def test_what_is_worse_by_more_than_the_tolerance_fails(tmp_path: Path):
    old = result(tmp_path, "old", **iteration(1.00))
    code, said = compare(result(tmp_path, "new", **iteration(1.10)), old)
    assert code == 0 and "+10.0%" in said
    code, said = compare(result(tmp_path, "new", **iteration(1.20)), old)
    assert code == 1 and "worse by 20.0%, more than 15%" in said
    assert compare(result(tmp_path, "new", **iteration(1.20)), old, "--tolerance", "0.25")[0] == 0
    assert compare(result(tmp_path, "new", **iteration(0.5)), old)[0] == 0


def test_shares_are_worse_where_they_are_less_cell_by_cell(tmp_path: Path):
    def rollout(**shares: float) -> dict[str, Any]:
        cell = {"tensor_parallel": 1, "max_concurrency": 64, "prompt_tokens": "32", "response_tokens": "128"}
        rows = [{**cell, "engines": int(n[1:]), "share_of_bare": {"median": share}} for n, share in shares.items()]
        return {"benchmark": "rollout", "rows": rows}

    old = result(tmp_path, "old", **rollout(n1=0.8, n2=0.9))
    code, said = compare(result(tmp_path, "new", **rollout(n1=0.8, n2=0.75)), old)
    assert code == 1 and "worse by 20.0%" in said
    code, said = compare(result(tmp_path, "new", **rollout(n1=0.8, n4=0.1)), old)
    assert code == 0 and "none" in said
    assert compare(result(tmp_path, "new", **rollout(n4=0.1)), old)[0] == 1


def test_a_driver_is_compared_by_how_its_work_grows(tmp_path: Path):
    def scaling(*costs: float) -> dict[str, Any]:
        rows = [{"engines": 10**n, "driver_cpu_ms_per_trajectory": cost} for n, cost in enumerate(costs)]
        return {"benchmark": "scaling", "rows": rows}

    old = result(tmp_path, "old", **scaling(1.0, 1.5))
    # A machine half as fast.
    assert compare(result(tmp_path, "new", **scaling(2.0, 3.0)), old)[0] == 0
    assert compare(result(tmp_path, "new", **scaling(1.0, 2.0)), old)[0] == 1


def test_iterations_beside_another_system_are_compared_by_their_ratio(tmp_path: Path):
    def peers(ratio: float) -> dict[str, Any]:
        return {"benchmark": "peers", "peer": "trl", "workload": "w1", "share_of_peer": {"median": ratio}}

    old = result(tmp_path, "old", **peers(0.5))
    assert compare(result(tmp_path, "new", **peers(0.55)), old)[0] == 0
    code, said = compare(result(tmp_path, "new", **peers(0.6)), old)
    assert code == 1 and "worse by 20.0%" in said


def test_a_measurement_without_a_stored_result_is_refused(tmp_path: Path):
    code, said = compare(result(tmp_path, "new", benchmark="packing", workload="w9", share_of_equal={"median": 1.0}))
    assert code == 1 and "holds no result of this measurement (benchmark packing, workload w9)" in said
