"""Which engines leave where the numbers change, with engines that are names alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.rollout.pool import RolloutPool


@pytest.mark.parametrize(
    ("serving", "joining", "count", "left", "started"),
    [
        ([0, 1, 2], [], 2, [2], []),
        ([0], [], 3, [], [1, 2]),
        ([0], [1, 2], 1, [2, 1], []),
        # The only one that serves goes on until the one that is to stay does.
        ([1], [0], 1, [], []),
        ([0, 1], [], 1, [1], []),
        ([0, 2], [1], 2, [], []),
        ([2, 3], [0, 1], 1, [3, 1], []),
        ([3], [0, 1], 2, [], []),
    ],
)
def test_who_leaves_and_who_starts(
    tmp_path: Path,
    serving: list[int],
    joining: list[int],
    count: int,
    left: list[int],
    started: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    nothing: Any = None
    released: list[int] = []
    placement: Any = SimpleNamespace(logs=tmp_path / "logs", release=lambda name, rank: released.append(rank))
    pool = RolloutPool(nothing, placement, nothing)
    pool._serving = {rank: f"engine {rank}" for rank in serving}
    pool._joining = {rank: (f"engine {rank}", nothing) for rank in joining}
    ended: list[str] = []
    begun: list[int] = []
    monkeypatch.setattr(pool, "_end", ended.append)
    monkeypatch.setattr(pool, "_start_beside", begun.append)
    pool.resize(count)
    assert (released, ended) == (left, [f"engine {rank}" for rank in left])
    assert begun == started
    assert sorted({*pool._serving, *pool._joining}) == sorted({*serving, *joining} - {*left})
