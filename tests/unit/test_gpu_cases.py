"""`benchmarks/gpu`: every case is configured so that it would run, and what it needs is said where it is missing."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_ray.driver.groups import engine_spec
from rlhf_ray.rollout.engine import engine_args

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
GIB_80, GIB_24 = 79.6, 22.5


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "cases", raising=False)
    import cases

    return cases


@pytest.fixture
def models(cases: ModuleType, tmp_path: Path) -> Path:
    """What configurations read of the models: their sizes."""
    for name in ("policy", "reward"):
        (tmp_path / name).mkdir()
        values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **cases.MODEL}
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    return tmp_path


def obstacles(cases: ModuleType, models: Path, gpus: int, memory: float, *, flash: bool) -> dict[str, str | None]:
    return {
        case.name: cases.obstacle(case, cases.config_of(case, models, 1, cpu=False), gpus, memory, flash=flash)
        for case in cases.CASES
    }


def test_every_case_fits_on_one_or_on_two_gpus_of_80_gib(cases: ModuleType, models: Path):
    one = obstacles(cases, models, 1, GIB_80, flash=True)
    two = obstacles(cases, models, 2, GIB_80, flash=True)
    needs_two = {case.name for case in cases.CASES if case.gpus == 2}
    assert {name for name, why in one.items() if why} == needs_two
    assert {one[name] for name in needs_two} == {"needs 2 GPUs, found 1"}
    assert {name: why for name, why in two.items() if why} == {
        "iteration, all groups on one GPU": "with 2 GPUs the groups are measured apart"
    }


def test_what_a_machine_lacks_is_said(cases: ModuleType, models: Path):
    assert set(obstacles(cases, models, 0, GIB_80, flash=True).values()) <= {
        "needs 1 GPU, found 0",
        "needs 2 GPUs, found 0",
    }
    small = {name: why for name, why in obstacles(cases, models, 1, GIB_24, flash=False).items() if why}
    assert small.pop("packing, flash attention") == "needs the package flash-attn"
    assert "GiB" in small.pop("iteration, all groups on one GPU")
    assert set(small.values()) == {"needs 2 GPUs, found 1"}


def test_cases_reach_what_they_are_named_after(cases: ModuleType, models: Path):
    configs = {case.name: cases.config_of(case, models, 1, cpu=False) for case in cases.CASES}
    specs = {name: engine_spec(config, ()) for name, config in configs.items()}
    assert "enforce_eager" not in engine_args(specs["rollout with CUDA graphs"])
    assert engine_args(specs["rollout without CUDA graphs"])["enforce_eager"] is True
    assert specs["iteration, all groups on one GPU"].sleeps and specs["transfer by CUDA IPC"].sleeps
    assert not specs["iteration, engine and trainers apart"].sleeps
    backends = {name: spec.backend for name, spec in specs.items()}
    assert backends["transfer by CUDA IPC"] == backends["iteration, all groups on one GPU"] == "ipc"
    assert backends["transfer between GPUs"] == backends["iteration, engine and trainers apart"] == "nccl"
    assert specs["tensor-parallel engine"].tensor_parallel == 2
    assert configs["packing, flash attention"].training.attention == "flash_attention_2"
    assert configs["packing, packed_sdpa"].training.attention == "packed_sdpa"
    assert configs["packing, compiled layers"].training.compile
    assert {config.training.dtype for config in configs.values()} == {"bf16"}


def test_what_runs_on_a_cpu_is_configured_for_one(cases: ModuleType, models: Path):
    able = [case for case in cases.CASES if case.cpu is not None]
    assert {case.measure for case in able} == {"rollout", "iteration", "transfer", "packing"}
    for case in able:
        config = cases.config_of(case, models, 1, cpu=True)
        assert config.policy.gpus == config.rollout.gpus == 0
        assert engine_spec(config, ()).backend == "gloo"


def test_all_cases_together_stay_within_the_time(cases: ModuleType):
    """Each uses its limit up; then those that follow get what one that ended early has left."""
    left = cases.TOTAL_S
    for index in range(len(cases.CASES)):
        left -= cases.time_limit(left, cases.CASES[index:])
    assert left == pytest.approx(0.0, abs=1e-9)
    last_two = cases.CASES[-2:]
    assert cases.time_limit(160.0, last_two) == pytest.approx(160.0 * 25 / 70)
    # Of the cases that one machine runs, none gets less than it is said to take.
    for gpus in (1, 2):
        able = [one for one in cases.CASES if one.gpus <= gpus and (one.most_gpus is None or gpus <= one.most_gpus)]
        assert sum(case.seconds for case in able) <= cases.TOTAL_S
