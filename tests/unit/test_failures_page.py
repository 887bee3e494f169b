"""docs/failures.md is what the results say, and the results are of the present cases."""

import json
import sys
from pathlib import Path

from test_performance_page import benchmark

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("system", "chaos"))

from chaos_cases import CASES


def test_the_page_is_current():
    module = benchmark("failures")
    assert module.PAGE.read_text() == module.page(), "run python benchmarks/failures.py"


def test_the_results_are_of_the_present_cases():
    report = json.loads(benchmark("failures").RESULTS.read_text())
    present = [(case.name, case.happens) for case in CASES]
    measured = [(one["case"], one["happens"]) for one in report["cases"]]
    assert measured == present, "run python -m benchmarks.chaos --out benchmarks/results/chaos.json"


def test_nothing_is_wrong_in_the_results():
    report = json.loads(benchmark("failures").RESULTS.read_text())
    wrong = {one["case"]: run["problems"] for one in report["cases"] for run in one["runs"] if run["problems"]}
    assert wrong == {}
