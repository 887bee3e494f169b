"""Which engines leave where the numbers change, and who samples what, with engines that are names alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.errors import EngineError
from rlhf_ray.rollout.engine import SampleRequest
from rlhf_ray.rollout.pool import RolloutPool
from rlhf_ray.runtime.patience import Patience
from rlhf_ray.runtime.supervisor import Supervisor


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
    pool = RolloutPool(nothing, placement, idle_supervisor())
    pool._serving = {rank: f"engine {rank}" for rank in serving}
    pool._joining = {rank: (f"engine {rank}", nothing) for rank in joining}
    ended: list[str] = []
    begun: list[int] = []
    monkeypatch.setattr(pool, "_end", lambda rank, engine: ended.append(engine))
    monkeypatch.setattr(pool, "_start_beside", begun.append)
    pool.resize(count)
    assert (released, ended) == (left, [f"engine {rank}" for rank in left])
    assert begun == started
    assert sorted({*pool._serving, *pool._joining}) == sorted({*serving, *joining} - {*left})


def idle_supervisor() -> Supervisor:
    """One that watches nothing."""
    return Supervisor(Path(), Patience(1.0, 1.0))


class Remembering:
    """In the place of an engine: what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.generate = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._generate))

    def _generate(self, requests: list[SampleRequest]) -> object:
        self.asked.append([f"{request.uid}{request.sample}" for request in requests])
        return object()


def test_each_prompt_goes_to_the_engine_with_the_fewest_tokens_to_do():
    nothing: Any = None
    pool = RolloutPool(nothing, nothing, idle_supervisor())
    engines = [Remembering(), Remembering()]
    pool._serving = dict(enumerate(engines))

    def requests(**prompts: int) -> list[SampleRequest]:
        return [SampleRequest(uid, n, [1] * size, 0, 1.0, 10) for uid, size in prompts.items() for n in range(2)]

    # Two samples each: a is 2 * (90 + 10) tokens, b 60, c 60, d 40, e 30.
    first = pool._send(requests(a=90, b=20, c=20, d=10, e=5))
    assert [one.asked for one in engines] == [[["a0", "a1"]], [["b0", "b1", "c0", "c1", "d0", "d1", "e0", "e1"]]]
    # 200 against 190; then one of the first engine's is done.
    second = pool._send(requests(f=1))
    assert engines[1].asked[1:] == [["f0", "f1"]]
    (of_first,) = (stream for stream in first.values() if stream.rank == 0)
    del of_first.requests["a", 0]
    # 100 against 212, then 240.
    third = pool._send(requests(g=60, h=1))
    assert [one.asked[-1] for one in engines] == [["g0", "g1"], ["h0", "h1"]]
    # What is over counts no more.
    del first, second, third, of_first
    pool._send(requests(i=1, j=1))
    assert [one.asked[-1] for one in engines] == [["i0", "i1"], ["j0", "j1"]]


def test_what_a_dead_engine_owed_goes_to_the_others_once():
    placement: Any = SimpleNamespace(logs=Path("logs"))
    nothing: Any = None
    pool = RolloutPool(nothing, placement, idle_supervisor())
    engines = [Remembering(), Remembering()]
    pool._serving = dict(enumerate(engines))
    streams = pool._send([SampleRequest(uid, 0, [1], 0, 1.0, 10) for uid in "abc"])
    assert [one.asked for one in engines] == [[["a0", "c0"]], [["b0"]]]
    (dead,) = (stream for stream in streams.values() if stream.rank == 0)
    del dead.requests["a", 0], pool._serving[0]
    error: Any = EngineError("rollout-0 died")
    handed_over = pool._hand_over(dead, error)
    assert engines[1].asked[1:] == [["c0"]]
    assert not dead.requests
    assert [list(stream.requests) for stream in handed_over.values()] == [[("c", 0)]]
