"""How often what dies is started again, and which ends of a run are followed by another start."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray.errors import ActorDied, BudgetExhausted, DataError, ResourceError, RlhfError, Stalled
from rlhf_ray.runtime.budget import RestartBudget
from rlhf_ray.stages import restarts
from rlhf_ray.stages.restarts import starts_again


def test_restarts_wait_longer_and_longer_and_end_after_three():
    budget = RestartBudget()
    cause = ActorDied("rollout-0 died")
    assert [budget.spend("rollout-0", cause) for _ in range(3)] == [0.0, 1.0, 2.0]
    assert budget.spend("rollout-1", cause) == 0.0  # each has its own
    with pytest.raises(BudgetExhausted, match="rollout-0 died\nrollout-0 was restarted 3 times") as caught:
        budget.spend("rollout-0", cause)
    assert caught.value.exit_code == 3
    budget.renew()
    assert budget.spend("rollout-0", cause) == 0.0


class Stage:
    """A stage that ends as it is told, each time after so many steps in all."""

    def __init__(self, folder: Path, *ends: tuple[int, RlhfError | None]) -> None:
        self.config = SimpleNamespace(run=SimpleNamespace(dir=str(folder)))
        self.metrics = folder / "metrics.jsonl"
        self.ends = list(ends)
        self.starts = 0

    def __call__(self, config: object) -> Path:
        steps, error = self.ends[self.starts]
        self.starts += 1
        self.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(steps)))
        if error is not None:
            raise error
        return self.metrics.parent


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(restarts, "time", SimpleNamespace(sleep=found.append))
    return found


DIED = ActorDied("policy-0 died")


@pytest.mark.parametrize(
    ("ends", "waited"),
    [
        ([(3, None)], []),
        ([(3, DIED), (5, None)], [0.0]),
        ([(0, DIED), (0, Stalled("no answer")), (0, DIED), (9, None)], [0.0, 1.0, 2.0]),
        # Progress gives the budget back.
        ([(1, DIED), (1, DIED), (2, DIED), (2, DIED), (2, DIED), (3, DIED), (9, None)], [0, 1, 0, 1, 2, 0]),
        # The node that left is missing for a while.
        ([(1, DIED), (1, ResourceError("too small")), (9, None)], [0.0, 1.0]),
    ],
)
def test_a_run_goes_on_after_a_death(
    tmp_path: Path, pauses: list[float], ends: list[tuple[int, RlhfError | None]], waited: list[float]
):
    stage = Stage(tmp_path, *ends)
    assert starts_again(stage)(stage.config) == tmp_path
    assert (stage.starts, pauses) == (len(ends), waited)


@pytest.mark.parametrize(
    ("ends", "raised"),
    [
        ([(0, ResourceError("too small"))], ResourceError),
        ([(2, DataError("row 3"))], DataError),
        ([(2, DIED), (2, DataError("row 3"))], DataError),
        ([(2, DIED)] * 4, BudgetExhausted),
        ([(2, BudgetExhausted("rollout-0"))], BudgetExhausted),
    ],
)
def test_what_another_start_does_not_mend_ends_it(
    tmp_path: Path, pauses: list[float], ends: list[tuple[int, RlhfError | None]], raised: type[RlhfError]
):
    stage = Stage(tmp_path, *ends)
    with pytest.raises(raised):
        starts_again(stage)(stage.config)
    assert stage.starts == len(ends)
