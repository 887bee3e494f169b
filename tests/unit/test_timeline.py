import json
import os
from pathlib import Path

import pytest

from rlhf_ray.cli import main
from rlhf_ray.errors import StageError
from rlhf_ray.tracking.activity import Activity
from rlhf_ray.tracking.timeline import (
    Span,
    cut,
    draw,
    group_shares,
    idle_shares,
    iterations,
    nobody_busy,
    perfetto,
    read_timeline,
)


def span(name: str, start: float, end: float, **details) -> Span:
    return Span(name, start, end, details)


TIMELINE = {
    "driver": [span("iteration", 0, 10, iteration=0), span("iteration", 10, 20, iteration=1)],
    "policy-0": [span("step", 6, 9), span("step", 16, 18)],
    "rollout-0": [span("generate", 1, 5), span("transfer", 4, 6), span("generate", 19, 21)],
    "critic-0": [span("forward", 2, 3), span("forward", 2.5, 4)],
    # An engine that came in the second iteration, and the other node of one that is split, which opens no spans.
    "rollout-1": [span("transfer", 12, 14)],
    "rollout-0-part-1": [],
}


def test_idle_shares_count_overlapping_work_once_and_cut_at_the_ends():
    assert idle_shares(TIMELINE, 0, 10) == pytest.approx({"policy-0": 0.7, "rollout-0": 0.5, "critic-0": 0.8})
    assert idle_shares(TIMELINE, 10, 20)["rollout-0"] == pytest.approx(0.9)


def test_who_was_not_there_is_not_idle():
    assert list(idle_shares(TIMELINE, 0, 10)) == ["policy-0", "rollout-0", "critic-0"]
    # The critic's last span was in the iteration before; the engine that came is there.
    assert list(idle_shares(TIMELINE, 10, 20)) == ["policy-0", "rollout-0", "rollout-1"]
    # A policy that rests for a while, as while the critic warms up, is there and idle.
    assert idle_shares(TIMELINE, 10, 15)["policy-0"] == 1.0


def test_an_engine_that_left_and_one_of_its_name_that_came_later_were_away_in_between():
    engines = {"rollout-2": [Span("generate", 1, 4, {}, 77), Span("generate", 31, 34, {}, 99)]}
    assert idle_shares(engines, 0, 10) == {"rollout-2": pytest.approx(0.7)}
    assert idle_shares(engines, 10, 20) == {}
    assert idle_shares(engines, 30, 40) == {"rollout-2": pytest.approx(0.7)}
    same = {"rollout-2": [Span("generate", 1, 4, {}, 77), Span("generate", 31, 34, {}, 77)]}
    assert idle_shares(same, 10, 20) == {"rollout-2": 1.0}


def test_a_groups_share_is_the_mean_of_its_processes():
    shares = idle_shares(TIMELINE, 10, 20)
    assert group_shares(shares) == pytest.approx({"policy": 0.8, "rollout": 0.85})


def test_a_cut_keeps_what_lies_between():
    assert cut(TIMELINE, 5, 8)["rollout-0"] == [span("transfer", 5, 6)]
    assert cut(TIMELINE, 5, 8)["policy-0"] == [span("step", 6, 8)]


def test_a_repeated_iteration_counts_as_it_was_last():
    again = {"driver": [*TIMELINE["driver"], span("iteration", 30, 41, iteration=1)]}
    assert iterations(again)[1].start == 30


def test_spans_that_overlap_have_lanes_of_their_own_in_the_trace():
    events = perfetto(TIMELINE)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    found = [
        (names[event["pid"]], event["name"], event["tid"], event["ts"], event["dur"])
        for event in events
        if event["ph"] == "X" and names[event["pid"]] in ("critic-0", "rollout-0")
    ]
    assert found == [
        ("rollout-0", "generate", 0, 1_000_000, 4_000_000),
        ("rollout-0", "transfer", 1, 4_000_000, 2_000_000),
        ("rollout-0", "generate", 0, 19_000_000, 2_000_000),
        ("critic-0", "forward", 0, 2_000_000, 1_000_000),
        ("critic-0", "forward", 1, 2_500_000, 1_500_000),
    ]


def test_a_picture_has_a_row_for_every_process(tmp_path):
    figure = draw(TIMELINE, 0, 10, "iteration 0")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["policy-0, idle 70%", "rollout-0, idle 50%", "critic-0, idle 80%"]
    below = figure.axes[0].get_xlabel().replace("\N{NO-BREAK SPACE}", " ")
    assert below == "seconds\nidle by group: policy 70%, rollout 50%, critic 80%"
    figure.savefig(tmp_path / "a.png")


def test_what_a_process_records_is_read_back(tmp_path):
    recorder = Activity("policy-0", tmp_path)
    with recorder.busy("step", tokens=10, micro_batches=2), recorder.busy("forward"):
        pass
    with pytest.raises(KeyError), recorder.busy("broken"):
        raise KeyError
    (tmp_path / "trace" / "policy-0.jsonl").open("a").write('{"name": "cut sho')
    spans = read_timeline(tmp_path)["policy-0"]
    assert [one.name for one in spans] == ["step", "forward", "broken"]
    assert spans[0].details == {"micro_batches": 2}
    assert {one.process for one in spans} == {os.getpid()}
    assert spans[0].start <= spans[1].start <= spans[1].end <= spans[0].end


def write_timeline(run: Path) -> None:
    (run / "trace").mkdir()
    for actor, spans in TIMELINE.items():
        lines = [json.dumps({"name": s.name, "start": s.start, "end": s.end, **s.details}) for s in spans]
        (run / "trace" / f"{actor}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def traced(run: Path) -> dict[str, list[tuple[str, float]]]:
    """Name and length in seconds of each span in a run's trace file, by process."""
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    found: dict[str, list[tuple[str, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            found.setdefault(names[event["pid"]], []).append((event["name"], event["dur"] / 1e6))
    return found


def test_the_command_writes_picture_and_trace_of_one_iteration(tmp_path, capsys):
    write_timeline(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["timeline", str(tmp_path), "--iteration", "0"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert out.startswith("iteration 0: 10.00 s\n")
    assert "rollout-0                idle  50.0%\n" in out
    groups = out.partition("mean of each group:\n")[2].splitlines()[:3]
    assert [line.split() for line in groups] == [
        ["critic", "idle", "80.0%"],
        ["policy", "idle", "70.0%"],
        ["rollout", "idle", "50.0%"],
    ]
    assert "rollout-1" not in out and "part-1" not in out
    assert traced(tmp_path) == {
        "driver": [("iteration", 10)],
        "policy-0": [("step", 3)],
        "rollout-0": [("generate", 4), ("transfer", 2)],
        "critic-0": [("forward", 1), ("forward", 1.5)],
    }
    assert (tmp_path / "timeline.png").stat().st_size > 1000
    with pytest.raises(SystemExit) as ended:
        main(["timeline", str(tmp_path), "--iteration", "7"])
    assert ended.value.code == 2
    assert "has no iteration 7; it has 0 to 1" in capsys.readouterr().err


def test_the_command_writes_the_whole_run_into_the_trace_where_all_is_asked_for(tmp_path, capsys):
    write_timeline(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["timeline", str(tmp_path), "--all"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("iteration 1: 10.00 s\n")
    assert {actor: len(spans) for actor, spans in traced(tmp_path).items()} == {
        actor: len(spans) for actor, spans in TIMELINE.items() if spans
    }


def test_a_directory_without_spans_is_an_error(tmp_path):
    with pytest.raises(StageError, match="holds no spans"):
        read_timeline(tmp_path)


def test_nobody_is_busy_where_no_process_but_the_driver_has_a_span():
    # Busy: 1 to 6 and 6 to 9 of the first ten seconds; 12 to 14, 16 to 18 and 19 to 20 of the second.
    assert nobody_busy(TIMELINE, 0, 10) == pytest.approx(0.2)
    assert nobody_busy(TIMELINE, 10, 20) == pytest.approx(0.5)
    assert nobody_busy({"driver": TIMELINE["driver"]}, 0, 10) == 1.0
