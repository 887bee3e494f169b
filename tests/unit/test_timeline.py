import json

import pytest

from rlhf_ray.cli import main
from rlhf_ray.errors import StageError
from rlhf_ray.tracking.activity import Activity
from rlhf_ray.tracking.timeline import Span, cut, draw, idle_shares, iterations, nobody_busy, perfetto, read_timeline


def span(name: str, start: float, end: float, **details) -> Span:
    return Span(name, start, end, details)


TIMELINE = {
    "driver": [span("iteration", 0, 10, iteration=0), span("iteration", 10, 20, iteration=1)],
    "policy-0": [span("step", 6, 9), span("step", 16, 18)],
    "rollout-0": [span("generate", 1, 5), span("transfer", 4, 6), span("generate", 19, 21)],
    "critic-0": [span("forward", 2, 3), span("forward", 2.5, 4)],
    "reward-0": [],
}


def test_idle_shares_count_overlapping_work_once_and_cut_at_the_ends():
    assert idle_shares(TIMELINE, 0, 10) == pytest.approx(
        {"policy-0": 0.7, "rollout-0": 0.5, "critic-0": 0.8, "reward-0": 1.0}
    )
    assert idle_shares(TIMELINE, 10, 20)["rollout-0"] == pytest.approx(0.9)


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
    assert labels == ["policy-0, idle 70%", "rollout-0, idle 50%", "critic-0, idle 80%", "reward-0, idle 100%"]
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
    assert spans[0].start <= spans[1].start <= spans[1].end <= spans[0].end


def test_the_command_writes_picture_and_trace(tmp_path, capsys):
    (tmp_path / "trace").mkdir()
    for actor, spans in TIMELINE.items():
        lines = [json.dumps({"name": s.name, "start": s.start, "end": s.end, **s.details}) for s in spans]
        (tmp_path / "trace" / f"{actor}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(SystemExit) as ended:
        main(["timeline", str(tmp_path), "--iteration", "0"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert out.startswith("iteration 0: 10.00 s\n")
    assert "rollout-0                idle  50.0%\n" in out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (tmp_path / "timeline.png").stat().st_size > 1000
    with pytest.raises(SystemExit) as ended:
        main(["timeline", str(tmp_path), "--iteration", "7"])
    assert ended.value.code == 2
    assert "has no iteration 7; it has 0 to 1" in capsys.readouterr().err


def test_a_directory_without_spans_is_an_error(tmp_path):
    with pytest.raises(StageError, match="holds no spans"):
        read_timeline(tmp_path)


def test_nobody_is_busy_where_no_process_but_the_driver_has_a_span():
    # Busy: 1 to 6 and 6 to 9 of the first ten seconds; 16 to 18 and 19 to 20 of the second.
    assert nobody_busy(TIMELINE, 0, 10) == pytest.approx(0.2)
    assert nobody_busy(TIMELINE, 10, 20) == pytest.approx(0.7)
    assert nobody_busy({"driver": TIMELINE["driver"]}, 0, 10) == 1.0
