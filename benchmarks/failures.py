"""Makes docs/failures.md from benchmarks/results/chaos.json.

python benchmarks/failures.py
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "chaos.json"
PAGE = ROOT / "docs" / "failures.md"

HEAD = """# Failures

What happens to a run when a part of it dies, hangs or is cut off, and what that costs. The first half says what is
meant to happen, the table what did.

## The failure model

* **Every wait has a deadline and an owner.** Nobody waits for an actor longer than ten times what the same phase took
  of late, between `run.min_timeout_s` and `run.timeout_s`. One supervisor watches all processes: a death is noticed
  within seconds, whether anything was asked of the process or not; a process that gives no sign is suspect after 5 s
  and ended after `run.min_timeout_s`, with a report in `stalls/` of the run directory. So a hang becomes a death.
* **Infrastructure is replaced, data is reported.** What died is started again, three times without an iteration in
  between, then the run ends with exit code 3. A reward function that raises, hangs or returns no number is a matter of
  the data: `min_scored` of that function says how many of its responses may be left out before the run ends, and
  `ppo.spare_prompts` sets prompts aside that take their place.
* **An engine** owes responses when it dies; the other engines sample them with the same seeds, so that they are the
  same responses, or its successor does where it was the only one. The successor serves after a whole transfer of
  weights and a probe that agrees. A transfer that is broken off begins again with those that live.
* **A reference or reward process** is started again from its weights, and gets what it owed once more.
* **A rank of a trainer** takes its group's state with it: all groups start again from the newest whole checkpoint, or
  from the beginning where there is none.
* **The driver** keeps nothing that is not in the run directory. The same command continues from the newest checkpoint;
  the old processes end with the old driver.
* **A node** is all of the above at once. One that is cut off from the driver hangs: a process there that owes an answer
  for 5 s while its host takes no connections counts as silent from then on, whatever it still writes to the run
  directory: suspect after 5 s more, ended after `run.min_timeout_s`, or earlier where the limit of the phase passes.
  What heals before goes on. Ray's head calls the node dead after about a minute with Ray's own settings
  (`RAY_health_check_failure_threshold` and `RAY_health_check_timeout_ms` on the head shorten that); only then can a
  process that was placed there start elsewhere.
* **A checkpoint** is whole or not there: it is written aside, sealed with checksums, and renamed. On a disk that is
  full the run goes on with the older ones and a warning; the last one must be written, or the run ends with an error.
* **In synchronous mode** (`ppo.max_staleness: 0`) none of this shows in the numbers: metrics, samples and weights are
  those of a run to which nothing happened, bit for bit, and `rlhf-ray verify` finds every prompt drawn as often as it
  should be, every token from the right weights, and every checkpoint whole.

"""

TABLE = """## What it costs

PPO of a tiny model with the real engines on CPU: five iterations, two engines, policy, critic, reference and reward
model, a checkpoint an iteration. Each process is struck in the state that the case names
(`rlhf_ray/runtime/chaos.py`), and the run is compared with an undisturbed one of the same seed.

* *Noticed*: until the driver's log says so; for the driver itself, until its process is gone.
* *At work again*: until its successor begins its first piece of the same work; a dash where there was none before the
  run ended.
* *Start-up*: of that successor, or of its whole group's processes where they all started at once.
* *Lost*: how much longer the whole run took, which is the start of processes for the most part.
* *Again*: iterations that were begun once more, and responses that another engine took over.
* *Outcome*: "equal" is a completed run with every metric, sample and weight of the undisturbed one, bit for bit, that
  `rlhf-ray verify` has nothing against and that left no process behind. "Completed" is the same but for the numbers,
  which differ where samples are left out of training or sampled ahead. "Ends" is a run that gives up as it should, with
  a checkpoint of all iterations that it trained.

`python -m benchmarks.chaos --out benchmarks/results/chaos.json` measures, `python benchmarks/failures.py` makes this
page. The middle of several runs stands first, the least and the largest in brackets. A case that ran once has no
brackets. The kills of the two soaks are drawn from a seed that was chosen for a mixture of victims, and the loop waits
for the successor of an engine before the next one. A reward function fails on a few responses of an iteration, as it is
asked about few at a time.
"""

BUDGET_EXHAUSTED = 3  # the exit code
MOST_EVENTS = 3  # whose figures fit a cell


def page() -> str:
    """The text of docs/failures.md."""
    report = json.loads(RESULTS.read_text())
    cases = report["cases"]
    lines = [HEAD.rstrip(), "", TABLE.rstrip(), *_machines(cases), ""]
    names = ("what happens", "noticed after, s", "at work again after, s", "start-up, s", "lost, s", "again", "outcome")
    lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += [_row(case) for case in cases]
    wrong = [f"* {case['happens']}: {problem}" for case in cases for one in case["runs"] for problem in one["problems"]]
    if wrong:
        lines += ["", "What was not as it should be:", "", *dict.fromkeys(wrong)]
    return "\n".join(lines) + "\n"


def _row(case: dict[str, Any]) -> str:
    runs = case["runs"]
    cells = [case["happens"], *(_events(runs, key) for key in ("noticed_s", "recovered_s", "start_up_s"))]
    cells += [_spread([one["lost_s"] for one in runs]), _again(runs), _outcome(case)]
    return "| " + " | ".join(cells) + " |"


def _events(runs: list[dict[str, Any]], key: str) -> str:
    """A figure of each event of a case; most have one."""
    columns = zip(*(one["events"] for one in runs), strict=True)
    found = [_spread([event[key] for event in of_runs if key in event]) for of_runs in columns]
    return ", ".join(found) if len(found) <= MOST_EVENTS else ""


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    middle = f"{median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f} to {max(values):.1f})"


def _again(runs: list[dict[str, Any]]) -> str:
    parts = []
    for key, unit in (("iterations_again", "iteration"), ("responses_again", "response")):
        most = max(one[key] for one in runs)
        if most:
            parts.append(f"{most} {unit}{'s' if most > 1 else ''}")
    return ", ".join(parts) or "nothing"


def _outcome(case: dict[str, Any]) -> str:
    good = sum(not one["problems"] for one in case["runs"])
    if set(case["runs"][0]["exit_codes"]) == {BUDGET_EXHAUSTED}:
        return f"ends, exit code {BUDGET_EXHAUSTED}" if good == len(case["runs"]) else "wrong"
    word = "equal" if case["equal"] else "completed"
    if case["runs"][0]["rewards"] and not case["equal"]:
        rewards = [one["rewards"] for one in case["runs"]]
        word += f", reward {median(r[3] for r in rewards):.3f} ({median(r[1] for r in rewards):.3f} undisturbed)"
    count = len(case["runs"])
    return word if good == count == 1 else f"{word}: {good} of {count}"


def _machines(cases: list[dict[str, Any]]) -> list[str]:
    """The machines and commits that the results are of."""
    return list(dict.fromkeys(f"\n{one['processor']}, {one['cores']} cores, commit {one['commit']}." for one in cases))


if __name__ == "__main__":
    PAGE.write_text(page())
