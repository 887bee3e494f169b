"""`benchmarks/staleness.py`: curves and tables from literal runs."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_ray.config import load_config

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "staleness.py"
CUP = "<user> the cup is red and is in the barn . what colour is it ? <bot>"
GOOD, SILENT = "gladly , the cup is red .", "."


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("staleness", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["staleness"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def run_of(kind: str, seed: int, gold: list[float], **curves: list[float | None]) -> dict[str, Any]:
    setting, staleness, *correction = kind.split("-")
    case = {"setting": setting, "staleness": int(staleness[1:]), "corrected": correction != ["plain"], "seed": seed}
    return case | {"kind": kind, "held_out": {"gold": gold[-1]}, "curves": {"gold": gold, **curves}}


def test_curves_are_of_the_iterations_and_of_the_weights_that_sampled(script: ModuleType, tmp_path: Path):
    # The critic warms up alone in two iterations: the fifth one trains on top of two updates.
    lags = [0.0, 0.0, 0.0, 1.0, 1.5]
    rows = [{"step": step, "sampling/staleness/mean": lag, "objective/kl": 0.5 * step} for step, lag in enumerate(lags)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "samples").mkdir()
    for step, replies in enumerate([[SILENT, SILENT], [SILENT, GOOD], [GOOD, GOOD], [GOOD, GOOD], [SILENT, GOOD]]):
        table = pa.table({"prompt": [CUP] * 2, "completion": replies})
        pq.write_table(table, tmp_path / "samples" / f"step_{step:06d}.parquet")
    curves = script.read_curves(tmp_path, warmup=2)
    assert curves["gold"] == [0, 0.5, 1, 1, 0.5]
    assert curves["kl"] == [0, 0.5, 1, 1.5, 2]
    assert curves["updates"] == [0, 0, 0, 0, 0.5]
    assert curves["masked"] == [None] * 5  # of a run without correction


def test_a_curve_is_summed_up_after_the_queue_has_filled_and_scores_at_the_end(script: ModuleType):
    # 20 iterations: staleness counts from the 11th, the gold score in the last 10.
    curves = {
        "gold": [0.0] * 10 + [0.6] * 5 + [0.8] * 5,
        "staleness_mean": [9.0] * 10 + [1.0] * 5 + [2.0] * 5,
        "staleness_max": [9.0] * 10 + [2.0] * 9 + [3.0],
        "masked": [None] * 20,
    }
    found = script.summarize_curves(curves)
    assert found == {"gold": pytest.approx(0.7), "staleness_mean": 1.5, "staleness_max": 3.0, "masked": None}


def test_a_row_is_over_the_seeds_of_a_kind(script: ModuleType):
    runs = [
        run_of("shipped-s0", 0, [0.5] * 9 + [0.6] * 3, masked=[None] * 12),
        run_of("shipped-s4-plain", 0, [0.5] * 12, masked=[0.25] * 12),
        run_of("shipped-s0", 1, [0.5] * 9 + [0.8] * 3, masked=[None] * 12),
    ]
    first, second = script.table_rows(runs)
    assert (first["kind"], first["staleness"], first["seeds"]) == ("shipped-s0", 0, [0, 1])
    assert first["held_out"]["gold"] == pytest.approx({"mean": 0.7, "min": 0.6, "max": 0.8})
    assert first["training"]["gold"] == pytest.approx({"mean": 0.56, "min": 0.53, "max": 0.59})
    assert first["training"]["masked"] is None
    assert (second["kind"], second["corrected"], second["seeds"]) == ("shipped-s4-plain", False, [0])
    assert second["training"]["masked"] == {"mean": 0.25, "min": 0.25, "max": 0.25}


def test_a_drawn_curve_is_the_mean_over_seeds_smoothed(script: ModuleType):
    runs = [
        run_of("shipped-s1-plain", 0, [0.0, 0.2, 0.4, 0.6], updates=[0.0, 1.0, 2.0, 3.0]),
        run_of("shipped-s1-plain", 1, [0.2, 0.4, 0.6, 0.8, 1.0], updates=[0.0, 0.0, 1.0, 2.0, 3.0]),
    ]
    points = script.mean_curve(runs, "updates", "gold", width=2)
    assert points == [pytest.approx(one) for one in [(0.25, 0.2), (1.0, 0.4), (2.0, 0.6)]]
    runs[0]["curves"]["gold"][0] = None
    assert script.mean_curve(runs, None, "gold", width=1)[0] == pytest.approx((1.0, 0.3))


def test_every_run_is_of_another_configuration(script: ModuleType, tmp_path: Path):
    base = load_config(script.CONFIG, [], "pipeline")
    models = {"sft": tmp_path / "sft", "reward": tmp_path / "reward"}
    cases = script.all_cases()
    configs = [script.ppo_config(base, models, case, tmp_path / case.name) for case in cases]
    assert len({config.run.dir for config in configs}) == len(cases) == 7 * len(script.SETTINGS) * len(script.SEEDS)
    for case, config in zip(cases, configs, strict=True):
        assert (config.ppo.max_staleness, config.run.seed) == (case.staleness, case.seed)
        assert (config.ppo.importance_cap is not None) == case.corrected
        assert config.ppo.iterations == 40


def test_the_result_is_json_and_the_drawing_one_row_of_panels_a_setting(script: ModuleType, tmp_path: Path):
    curves = {name: [0.5] * 12 for name in ("updates", "off_policy_kl", "staleness_mean")}
    runs = [run_of(kind, 0, [0.5] * 12, **curves) for kind in ("shipped-s0", "fast-s0", "fast-s4-plain")]
    report = json.loads(script.report(runs, {"gold": 0.4}, {"commit": "abc"}))
    assert report["runs"] == runs and report["sft"] == {"gold": 0.4} and len(report["rows"]) == 3
    script.draw(runs, tmp_path / "docs" / "drawing.svg")
    drawing = (tmp_path / "docs" / "drawing.svg").read_text()
    assert drawing.count("<!-- setting: ") == 2 and "4, not corrected" in drawing


def test_the_page_has_a_table_for_each_setting_and_a_line_for_each_kind(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    page = importlib.import_module("page")
    stale = {"staleness_mean": [3.5] * 12, "staleness_max": [4.0] * 12, "off_policy_kl": [0.02] * 12}
    fresh = {name: [0.0] * 12 for name in stale}
    weights = {"truncated": [0.01] * 12, "masked": [0.002] * 12}
    none = {name: [None] * 12 for name in weights}
    runs = [
        run_of("shipped-s0", 0, [0.9] * 12, **fresh, **none),
        run_of("shipped-s0", 1, [0.8] * 12, **fresh, **none),
        run_of("fast-s4-corrected", 0, [0.7] * 12, **stale, **weights),
    ]
    for run in runs:
        run["held_out"] |= {"score": 1.5, "kl": 4.25}
    around = {"command": "python x.py", "processor": "a processor", "commit": "abc"}
    text = "\n".join(page.staleness(json.loads(script.report(runs, {"gold": 0.625, "score": 0.0}, around))))
    end = "1.50 (1.50 to 1.50) | 4.25 (4.25 to 4.25) |"
    assert f"| 0 |  | 0.00 | 0 | 0.0000 |  |  | 0.850 (0.800 to 0.900) | {end}" in text
    assert f"| 4 | yes | 3.50 | 4 | 0.0200 | 1.0% | 0.2% | 0.700 (0.700 to 0.700) | {end}" in text
    assert text.count("Setting `") == 2 and "The SFT model: gold 0.625" in text


def test_figures_have_five_digits(script: ModuleType):
    assert script.rounded({"a": [1 / 3, None, float("nan")], "b": 7, "c": "x"}) == {
        "a": [0.33333, None, None],
        "b": 7,
        "c": "x",
    }


def test_runs_of_the_stored_result_stay_where_they_began_from_the_same_models(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(script, "RESULT", tmp_path / "staleness.json")
    assert script.stored({"gold": 0.4}) == {}
    curves = dict.fromkeys((*script.METRICS, "updates"), [1.0] * 12)
    run = run_of("shipped-s4-plain", 1, [0.5] * 12, **curves)
    script.RESULT.write_text(script.report([run], {"gold": 0.4}, {}))
    assert script.stored({"gold": 0.4}) == {"shipped-s4-plain-seed1": run}
    assert script.stored({"gold": 0.41}) == {}
    monkeypatch.setattr(script, "SETTINGS", {"shipped": {}})
    assert script.stored({"gold": 0.4}) == {}
