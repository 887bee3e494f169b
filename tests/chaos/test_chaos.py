"""Failures, each in a state of its own, on the real engines: a run's numbers are those of one that nothing happened to.

The short form is three runs: an undisturbed one, one that loses an engine, a scorer and a trainer, each in another
iteration, and one whose driver dies. The others are marked `long`, and `python -m benchmarks.chaos` measures them all.
"""

import os

import pytest
from chaos_cases import CASES, DRIVERS, NEED_ROOT, ONE_AFTER_ANOTHER
from chaos_runs import Case, Runs

pytestmark = pytest.mark.system

(DRIVER_IN_TRAINING,) = (case for case in DRIVERS if case.name == "driver-train")
SHORT = [ONE_AFTER_ANOTHER, DRIVER_IN_TRAINING]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_failures_cost_time_alone(runs: Runs, case: Case):
    found = runs.run(case)
    assert found["problems"] == []
    assert len(found["events"]) == len(case.events)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", [case for case in CASES if case not in SHORT], ids=lambda case: case.name)
def test_every_failure_costs_time_alone(runs: Runs, case: Case):
    if case in NEED_ROOT and os.getuid() != 0:
        pytest.skip("needs root, for a disk or hosts of its own")
    assert runs.run(case)["problems"] == []
