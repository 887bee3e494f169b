"""One PPO run that something happens to, beside one that nothing happens to, for tests and `benchmarks/chaos.py`.

A run is the command in a process of its own, so that its end and Ray's are real; where the driver is the victim, the
same command is given again.
"""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import pyarrow.parquet as pq
from ppo_runs import Inputs, make_inputs, rows_of

from rlhf_ray.config import PPOConfig, dump_config
from rlhf_ray.driver.verify import verify
from rlhf_ray.runtime.chaos import CHAOS, HAPPENED, Event, write_plan
from rlhf_ray.tracking.activity import group_of

ROOT = Path(__file__).resolve().parents[2]
# What the clock decides, and how many engines there were; every other number of a run its configuration decides.
CLOCK = ("time/", "rollout/tokens_per_second", "rollout/engines")
RUN_LIMIT_S = 600.0
LAST = 5  # iterations whose reward is averaged
NOTICED_WITHIN_S = 5.0  # of a death, or of the deadline of a hang
END_S = 30.0  # for Ray's processes to end after their driver
# The span that shows that the successor of a process works.
WORK = {
    "rollout": "generate",
    "policy": "step",
    "critic": "step",
    "reference": "log-probabilities",
    "reward": "scores",
    "driver": "iteration",
}
HELPERS = ("mark", "hold")  # what strikes nobody
STRIKES = ("kill", "kill node", "stop")
# States of the driver in which an iteration is not finished.
WITHIN_ITERATION = ("iteration", "wait", "generate", "advantages", "train", "transfer")
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) ([A-Z]+ rlhf_ray[\w.]*: .*)")
# Of the supervisor, which says of every process what becomes of it.
NOTICED = re.compile(r"\b(dead|died|suspect|no sign)\b")
HANDED_OVER = re.compile(r"(\d+) responses go to")

# Two engines, so that one can be missed. They sample four responses at a time, so that some are finished while others
# are not; deadlines are short, and long enough for two cores that others use too.
COMMON: dict[str, dict[str, Any]] = {
    "run": {"seed": 3, "timeout_s": 120.0, "min_timeout_s": 30.0, "checkpoint_every": 1},
    "policy": {"cpus": 0.25},
    "critic": {"cpus": 0.25},
    "rollout": {"cpus": 0.25, "engines": 2, "max_concurrency": 4},
    "ppo": {"iterations": 5, "prompts_per_iteration": 8},
}


@dataclass(frozen=True)
class Place:
    """Where a command is given.

    Attributes:
        environment: variables beside those of this process.
        within: what is put before the command.
        settle: waits until what happens around the run is over, which may take longer than the run.
    """

    environment: dict[str, str] = field(default_factory=dict)
    within: tuple[str, ...] = ()
    settle: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    """A run and what happens to it.

    Attributes:
        name: of the case.
        happens: the same in words.
        events: what strikes it.
        changes: keys of the configuration, by section, also of the undisturbed run that it is compared with.
        only_here: keys that this run alone has.
        exit_code: of the last command; where it is not 0, the run ends for good, with a checkpoint of what it trained.
        heals: whether what strikes is over before it counts as a failure.
        starts: how often the command is given; all but the last end with an error or the driver's death.
        equal: whether its numbers are those of the undisturbed run, bit for bit.
        reward_within: how far the reward that it learned may be from that of the undisturbed run, which must have
            learned more than that.
        around: entered for the length of the run with its folder; yields where the command is given.
    """

    name: str
    happens: str
    events: tuple[Event, ...] = ()
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    only_here: dict[str, dict[str, Any]] = field(default_factory=dict)
    exit_code: int = 0
    heals: bool = False
    starts: int = 1
    equal: bool = True
    reward_within: float | None = None
    around: Callable[[Path], AbstractContextManager[Place]] | None = None


class Runs:
    """Runs of cases in one folder; undisturbed ones are made once for all that they are compared with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._inputs: Inputs = make_inputs(folder)
        self._undisturbed: dict[str, dict[str, Any]] = {}

    def run(self, case: Case) -> dict[str, Any]:
        """What came of it, and what is wrong with that (`problems`, in words)."""
        expected = self.undisturbed(case)
        count = sum(1 for _ in self._folder.glob(f"{case.name}.*"))
        found = self._make(case, self._folder / f"{case.name}.{count}")
        found["equal"] = differences(expected["config"], found["config"])
        found["undisturbed_s"] = expected["loop_s"]
        found["lost_s"] = found["loop_s"] - expected["loop_s"]
        found["rewards"] = [*learned(expected["config"]), *learned(found["config"])]
        found["problems"] = problems(case, found)
        return found

    def undisturbed(self, case: Case) -> dict[str, Any]:
        """The run of the case's configuration that nothing happens to."""
        key = json.dumps(case.changes, sort_keys=True)
        if key not in self._undisturbed:
            name = f"undisturbed-{len(self._undisturbed)}"
            found = self._make(Case(name, "nothing", changes=case.changes), self._folder / name)
            assert found["exit_codes"] == [0], found["output"]
            self._undisturbed[key] = found
        return self._undisturbed[key]

    def _config(self, case: Case, folder: Path) -> PPOConfig:
        sections: dict[str, dict[str, Any]] = {}
        for part in (COMMON, case.changes, case.only_here):
            for section, keys in part.items():
                sections[section] = sections.get(section, {}) | keys
        defaults = self._inputs.config("x").model_dump(mode="json", exclude_unset=True)
        sections = {name: defaults.get(name, {}) | keys for name, keys in sections.items()}
        sections["run"]["dir"] = str(folder / "run")
        return self._inputs.config("x", **sections)

    def _make(self, case: Case, folder: Path) -> dict[str, Any]:
        folder.mkdir()
        config = self._config(case, folder)
        file = folder / "ppo.yaml"
        file.write_text(dump_config(config))
        environment = write_plan(folder / "plan.json", Path(config.run.dir), list(case.events))
        ends: list[tuple[float, int | None]] = []
        around = case.around(folder) if case.around else nullcontext(Place())
        with around as place, _ended_at_last(environment[CHAOS]):
            for start in range(case.starts):
                ends.append(_command(file, environment, place, folder / f"output-{start}.txt"))
                if ends[-1][1] in (0, None):
                    break
            place.settle()
            left = _left(environment[CHAOS])
            if "RAY_ADDRESS" in place.environment:
                left += _held(place)
        outputs = sorted(folder.glob("output-*.txt"))
        return {
            "case": case.name,
            "happens": case.happens,
            "config": config,
            "exit_codes": [code for _, code in ends],
            "loop_s": _loop_s(case, folder, Path(config.run.dir)),
            "output": outputs[-1].read_text()[-3000:],
            "left": left,
            "findings": [f"{one.subject}: {one.problem}" for one in verify(Path(config.run.dir)) if one.problem],
            "events": [
                _event(event, folder, Path(config.run.dir), [at for at, _ in ends])
                for event in case.events
                if event.action not in HELPERS
            ],
            **_repeated(case, folder, Path(config.run.dir)),
        }


def _command(config: Path, plan: dict[str, str], place: Place, output: Path) -> tuple[float, int | None]:
    """Give the command; when it ended and its exit code, None where it had to be ended."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "system"), str(Path(__file__).parent)])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with output.open("w") as file:
        process = subprocess.Popen(
            [*place.within, sys.executable, "-m", "rlhf_ray", "ppo", str(config)],
            env=inherited | {"PYTHONPATH": path} | plan | place.environment,
            stdout=file,
            stderr=file,
            cwd=config.parent,
        )
        try:
            code: int | None = process.wait(RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    return time.time(), code


def processes_under(plan: str) -> list[psutil.Process]:
    """The living processes of a run, Ray's own included where the run started Ray."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(CHAOS) == plan and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _left(plan: str) -> list[str]:
    """Command lines of what outlives the run."""
    deadline = time.monotonic() + END_S
    while (processes := processes_under(plan)) and time.monotonic() < deadline:
        time.sleep(0.5)
    found = []
    for process in processes:
        try:
            found.append(" ".join(process.cmdline())[:120])
        except psutil.NoSuchProcess:
            continue
    return found


# What a cluster still holds for its runs.
HELD = """
import sys
import ray
from ray.util.placement_group import placement_group_table
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
held = [f"placement group {key}" for key, one in placement_group_table().items() if one["state"] != "REMOVED"]
held += [f"actor {one['name']}" for one in ray.util.list_named_actors(all_namespaces=True)]
print(*held, sep="\\n", end="")
"""


def _held(place: Place) -> list[str]:
    command = [*place.within, sys.executable, "-c", HELD, place.environment["RAY_ADDRESS"]]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout.splitlines()


@contextmanager
def _ended_at_last(plan: str) -> Iterator[None]:
    """Nothing of a run outlives the block, whatever is wrong with it."""
    try:
        yield
    finally:
        for process in processes_under(plan):
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue


# ---- what a run came to


def problems(case: Case, found: dict[str, Any]) -> list[str]:
    """What is not as it should be, in words."""
    wrong = []
    *before, last = found["exit_codes"]
    if last != case.exit_code:
        wrong.append(f"ended with exit code {last}: {_last_lines(found['output'])}")
    if case.exit_code and not _saved(found["config"]):
        wrong.append("there is no checkpoint of the iterations that were trained")
    if len(before) != case.starts - 1:
        wrong.append(f"the command was given {len(before) + 1} times, and {case.starts} were expected")
    wrong += [f"{one['name']} did not happen" for one in found["events"] if "time" not in one]
    wrong += [f"verify: {one}" for one in found["findings"]]
    wrong += [f"left behind: {one}" for one in found["left"]]
    victims = {group_of(event.victim or event.actor) for event in case.events if event.action in STRIKES}
    if victims <= {"rollout", "reference", "reward"} and found["iterations_again"]:
        wrong.append(f"the loop was stopped: {found['iterations_again']} iterations were begun again")
    if last == 0 and case.equal:
        wrong += [f"not as undisturbed: {one}" for one in found["equal"]]
    if last == 0 and case.reward_within is not None:
        before, expected, _, reward = found["rewards"]
        if abs(reward - expected) > case.reward_within or expected - before < case.reward_within:
            wrong.append(f"reward {reward:.3f}, undisturbed {before:.3f} at first and {expected:.3f} at last")
    return wrong


def _saved(config: PPOConfig) -> bool:
    """Whether the newest checkpoint is of all iterations that the metrics know, and there are any."""
    steps = len(rows_of(config))
    return steps > 0 and (Path(config.run.dir) / "checkpoints" / f"step_{steps:06d}").is_dir()


def late(case: Case, found: dict[str, Any]) -> list[str]:
    """What was not noticed, or not in service again, as soon as it should be. For machines that do nothing else."""
    wrong = []
    limits = found["config"].run
    for event in case.events:
        one = next((row for row in found["events"] if row["name"] == event.name), None)
        if one is None or event.action not in STRIKES:
            continue
        hang = limits.min_timeout_s if event.action == "stop" else 0.0
        if one.get("noticed_s", 0.0 if case.heals else math.inf) > hang + NOTICED_WITHIN_S:
            wrong.append(f"{event.name} was noticed after {one.get('noticed_s', math.inf):.1f} s")
        within = hang + NOTICED_WITHIN_S + 2 * one.get("start_up_s", math.inf)
        last_of_victim = [row for row in found["events"] if row["victim"] == one["victim"]][-1] is one
        if one["victim"].startswith("rollout") and last_of_victim and one.get("recovered_s", 0.0) > within:
            wrong.append(f"{one['victim']} was in service again after {one['recovered_s']:.1f} s")
    return wrong


def _last_lines(output: str) -> str:
    return " | ".join(output.strip().splitlines()[-4:])[-600:]


def differences(expected: PPOConfig, found: PPOConfig) -> list[str]:
    """Where a run's numbers are not those of another: metrics, samples, weights or the summary."""
    there, here = Path(expected.run.dir), Path(found.run.dir)
    different = []
    parts = {"metrics": _metrics, "samples": _samples, "weights": _weights, "summary": _summary}
    for name, read in parts.items():
        try:
            if read(here) != read(there):
                different.append(name)
        except FileNotFoundError as error:
            different.append(f"{name} ({error})")
    return different


def _metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCK)} for row in rows]


def _samples(run: Path) -> dict[str, list[dict[str, Any]]]:
    return {file.name: pq.read_table(file).to_pylist() for file in sorted((run / "samples").glob("*.parquet"))}


def _weights(run: Path) -> dict[str, str]:
    files = [run / folder / "model.safetensors" for folder in ("model", "critic")]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _summary(run: Path) -> dict[str, Any]:
    """All but where the model is."""
    return {name: value for name, value in json.loads((run / "summary.json").read_text()).items() if name != "model"}


def _event(event: Event, folder: Path, run: Path, ends: list[float]) -> dict[str, Any]:
    """When an event happened, was noticed and was made up for, in seconds after it; without "time" it did not.

    And how long its successor took to start.
    """
    found: dict[str, Any] = {"name": event.name, "victim": event.victim or event.actor, "state": event.state}
    file = folder / f"{event.name}{HAPPENED}"
    if not file.is_file():
        return found
    happened = json.loads(file.read_text())
    at = happened["time"]
    found["time"] = at
    said = [(when, line) for when, line in warnings_of(run) if when >= at]
    if event.action in STRIKES:
        said = [(when, line) for when, line in said if group_of(found["victim"]) in line]
    if found["victim"] == "driver":
        said = [(end, "the process ended") for end in ends if end >= at]
    if said:
        found["noticed_s"], found["line"] = said[0][0] - at, said[0][1][:300]
    work = WORK[group_of(found["victim"])]
    started = re.compile(rf" {found['victim']}: (?:stale|serving), was starting for ([\d.]+) s")
    again = [
        row["start"]
        for row in spans_of(run, found["victim"])
        if row["name"] == work and row["process"] != happened["process"] and row["start"] >= at
    ]
    if again:
        found["recovered_s"] = min(again) - at
    if starts := [
        float(match[1]) for when, line in _driver_lines(run) if when > at and (match := started.search(line))
    ]:
        found["start_up_s"] = starts[0]
    # An iteration that was broken off is begun again, and its last span is the one that counts.
    ends_of = {row["iteration"]: row["end"] for row in spans_of(run, "driver") if row["name"] == "iteration"}
    if finished := [end for end in ends_of.values() if end >= at]:
        found["next_iteration_s"] = min(finished) - at
    return found


def warnings_of(run: Path) -> list[tuple[float, str]]:
    """What the driver had to say above what it always says, and when."""
    return [
        (when, line)
        for when, line in _driver_lines(run)
        if line.startswith(("WARNING", "ERROR", "CRITICAL")) or NOTICED.search(line)
    ]


def _driver_lines(run: Path) -> list[tuple[float, str]]:
    """Its log: when, and what from the level on."""
    log = run / "logs" / "driver.log"
    lines = [LINE.fullmatch(line) for line in log.read_text(errors="replace").splitlines()] if log.is_file() else []
    return [
        (time.mktime(time.strptime(line[1], "%Y-%m-%d %H:%M:%S")) + int(line[2]) / 1000, line[3])
        for line in lines
        if line
    ]


def spans_of(run: Path, actor: str) -> list[dict[str, Any]]:
    """The finished spans of an actor, its successors' included; a line that a kill cut off is none."""
    file = run / "trace" / f"{actor}.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _loop_s(case: Case, folder: Path, run: Path) -> float:
    """Seconds from the first iteration's beginning to the last one's end, without those that the plan held the loop."""
    iterations = [row for row in spans_of(run, "driver") if row["name"] == "iteration"]
    if not iterations:
        return math.nan
    held = 0.0
    for event in case.events:
        files = [folder / f"{name}{HAPPENED}" for name in (event.name, event.until)]
        if event.action == "hold" and all(file.is_file() for file in files):
            begun, ended = (json.loads(file.read_text())["time"] for file in files)
            held += max(0.0, ended - begun)
    return max(row["end"] for row in iterations) - min(row["start"] for row in iterations) - held


def _repeated(case: Case, folder: Path, run: Path) -> dict[str, int]:
    """Iterations that were begun more than once, and responses that one engine handed to another."""
    begun = [row["iteration"] for row in spans_of(run, "driver") if row["name"] == "iteration"]
    killed = [
        event
        for event in case.events
        if (event.victim or event.actor) == "driver"
        and event.action == "kill"
        and event.state in WITHIN_ITERATION
        and (folder / f"{event.name}{HAPPENED}").exists()
    ]
    handed = [HANDED_OVER.search(line) for _, line in warnings_of(run)]
    return {
        "iterations_again": len(begun) + len(killed) - len(set(begun)),
        "responses_again": sum(int(match[1]) for match in handed if match),
    }


def learned(config: PPOConfig) -> tuple[float, float]:
    """The mean reward of the first and of the last iterations."""
    scores = [row["objective/scores"] for row in rows_of(config)] or [math.nan]
    return mean(scores[:LAST]), mean(scores[-LAST:])
