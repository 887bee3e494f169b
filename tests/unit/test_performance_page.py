"""docs/performance.md is what the results say, and the results are those of the present formulas."""

import importlib.util
import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    module = benchmark("page")
    assert module.PAGE.read_text() == module.page(), "run python benchmarks/page.py"


def test_estimates_of_memory_are_within_15_percent_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX"):
        monkeypatch.setenv(name, "2")  # which the module sets for its workers, and this test takes back
    memory = benchmark("memory")
    rows = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())["cells"]
    cells = [*memory.ENGINES, *memory.SCORERS, *memory.CELLS]
    assert len(rows) == len(cells)
    models = {head: memory.make_model(tmp_path, head) for head in ("causal", "scalar")}
    small = memory.make_model(tmp_path, "causal", small=True)
    for row, cell in zip(rows, cells, strict=True):
        assert {key: row[key] for key in vars(cell)} == vars(cell)
        scalar = getattr(cell, "head", None) == "scalar" or getattr(cell, "group", None) == "reward"
        parts = memory.foretold(cell, models["scalar" if scalar else "causal"], small, gpu=False)
        assert sum(parts.values()) / memory.GIB == pytest.approx(row["measured_gib"], rel=0.15), cell
        if "libraries_gib" in row:
            assert row["libraries_estimated_gib"] == pytest.approx(row["libraries_gib"], rel=0.15)


def test_estimates_of_throughput_are_within_20_percent_of_what_was_measured():
    module = benchmark("throughput")
    report = json.loads((ROOT / "benchmarks" / "results" / "throughput.json").read_text())
    assert {row["workload"] for row in [*report["measured"], *report["foretold"]]} >= {"w1", "w2", "w3"}
    assert [
        module.Run(row["workload"], row["iterations"], row["overrides"]) for row in report["foretold"]
    ] == module.RUNS
    cores = report["hardware"][0]["cpus"]
    for row in report["foretold"]:
        found = module.estimated(row, report["cells"], cores)
        assert found == pytest.approx(statistics.median(row["measured_s"]), rel=0.2), row["workload"]
        assert found == pytest.approx(row["estimated_s"]), "run python benchmarks/throughput.py --again FILE --out FILE"


def test_the_loop_waits_less_than_a_tenth_of_an_iteration_for_a_checkpoint():
    report = json.loads((ROOT / "benchmarks" / "results" / "checkpoint_w1.json").read_text())
    assert "run.checkpoint_every=1" in report["command"].split()
    assert 0 < report["checkpoint_share"]["min"] <= report["checkpoint_share"]["max"] <= 0.1


def test_memory_is_flat_in_the_second_half_of_200_iterations():
    report = json.loads((ROOT / "benchmarks" / "results" / "soak.json").read_text())
    assert report["iterations"] == 200
    assert {"driver", "policy-0", "critic-0", "reference-0", "reward-0", "rollout-0"} == set(report["processes"])
    for name, row in report["processes"].items():
        tenths = row["tenths_mib"]
        assert len(tenths) == 10
        assert tenths[-1] <= 1.015 * tenths[4], name
        assert tenths[-1] <= 1.01 * tenths[7], name
