"""From what the doctor has measured to lines with a verdict and a remedy. Pure: facts in, lines out."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf_ray.placement.inventory import Node as Place
from rlhf_ray.placement.layout import crowding, lay_out, misfits
from rlhf_ray.placement.plan import RESOURCE_KEYS, Plan, shortfalls

Verdict = Literal["ok", "warning", "problem"]
Facts = Mapping[str, Any]

GIB = 2**30

# Ray's memory monitor ends processes of a node above 95 % of its memory.
MEMORY_USED_WARNING, MEMORY_USED_PROBLEM = 0.9, 0.95
# A container has 64 MiB of shared memory where nothing else is asked for, too little for NCCL.
SHARED_MEMORY_WARNING, SHARED_MEMORY_PROBLEM = GIB, 64 * 2**20
OBJECT_STORE_WARNING = 64 * 2**20
# Ray takes a few files for each process and connection, and recommends 65536.
OPEN_FILES_WARNING, OPEN_FILES_PROBLEM = 8192, 512
# Ray stops spilling objects above 95 % of a disk.
DISK_USED_WARNING = 0.95
RAY_DISK_PROBLEM = GIB
RUN_DISK_WARNING, RUN_DISK_PROBLEM = 20 * GIB, GIB
CLOCK_WARNING_S = 1.0
GPU_FREE_WARNING = 0.9
LATENCY_WARNING_S = 5e-3
BYTES_PER_S_WARNING = {"gloo": 1e8, "nccl": 1e9}

NO_ANSWER = "look at this node: a check that hangs or fails is mostly a file system or a driver that does not answer"


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        check: what was looked at.
        where: the node, or "cluster" or "driver".
        verdict: "problem" where a run would fail.
        found: what there is, with units.
        remedy: what to do; empty where all is well.
    """

    check: str
    where: str
    verdict: Verdict
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Node:
    """What is known of a node.

    Attributes:
        name: its address, with a part of its id where addresses are not unique.
        resources: what Ray was told that it has: `CPU`, `GPU`, `object_store_memory` in bytes.
        report: the facts of each check of `probe.py`, and `clock`.
    """

    name: str
    resources: Mapping[str, float]
    report: Mapping[str, Facts]


@dataclass(frozen=True)
class Exchange:
    """What came of nodes meeting in a process group: the nodes in rank order, and what each of them answered."""

    nodes: tuple[str, ...]
    answers: tuple[Facts, ...]

    @property
    def failed(self) -> bool:
        """Whether a node answered with an error."""
        return any("error" in answer for answer in self.answers)


Judgement = tuple[Verdict, str, str]


def judge_node(node: Node, versions: Facts, gpu_share: float | None) -> list[Line]:
    """The lines of one node.

    Args:
        node: the node; where its probe did not answer, `probe` of the report says so.
        versions: those of the driver.
        gpu_share: the share of a GPU's memory that an engine asks to be free; None where no engine uses GPUs.
    """
    judges: dict[str, Callable[[Facts], Judgement]] = {
        "versions": lambda facts: _versions(facts, versions),
        "cpu": lambda facts: _cpu(facts, node.resources.get("CPU", 0.0)),
        "memory": _memory,
        "gpu": lambda facts: _gpu(facts, node.resources.get("GPU", 0.0), gpu_share),
        "shared memory": lambda facts: _shared_memory(facts, node.resources),
        "open files": _open_files,
        "Ray's disk": _ray_disk,
        "clock": _clock,
        "run directory": _run_directory,
    }
    if "probe" in node.report:
        remedy = "`ray status` shows whether it is alive; the node's Ray logs (raylet.err) say why no process starts"
        return [Line("probe", node.name, "problem", node.report["probe"]["error"], remedy)]
    lines = []
    for check, judge in judges.items():
        facts = node.report.get(check)
        if facts is not None:
            judgement = ("problem", facts["error"], NO_ANSWER) if "error" in facts else judge(facts)
            lines.append(Line(check, node.name, *judgement))
    if "models" in node.report:
        lines += _models(node.name, node.report["models"])
    return lines


def judge_gpu_drivers(nodes: Iterable[Node], used: bool) -> list[Line]:
    """Whether all nodes with GPUs have the same NVIDIA driver; no line where fewer than two of them say.

    Drivers that support CUDA of one major version run the same programs; of others, perhaps not.

    Args:
        nodes: all nodes.
        used: whether the run takes GPUs.
    """
    named: dict[str, list[str]] = {}
    cuda: set[str] = set()
    for node in nodes:
        facts = node.report.get("gpu", {})
        if facts.get("gpus"):
            named.setdefault(str(facts["NVIDIA driver"]), []).append(node.name)
            cuda.add(str(facts["CUDA"]).partition(".")[0])
    if sum(map(len, named.values())) < 2:
        return []
    if len(named) == 1:
        return [Line("NVIDIA driver", "cluster", "ok", f"{next(iter(named))} on every node with GPUs")]
    found = "; ".join(f"{version} on {', '.join(places)}" for version, places in sorted(named.items()))
    verdict: Verdict = "problem" if used and len(cuda) > 1 else "warning"
    return [Line("NVIDIA driver", "cluster", verdict, found, "install the same driver on every node with GPUs")]


def judge_driver(report: Mapping[str, Facts]) -> list[Line]:
    """The lines of the process that leads a run.

    Args:
        report: `versions`, and where a configuration asks for it `run directory` and `tracker`.
    """
    lines = [_driver_versions(report["versions"])]
    if "error" in report.get("run directory", {}):
        found = f"run.dir cannot be written: {report['run directory']['error']}"
        lines.append(Line("run directory", "driver", "problem", found, "change run.dir, or the rights to write there"))
    if "tracker" in report:
        lines.append(Line("tracker", "driver", *_tracker(report["tracker"])))
    return lines


def _driver_versions(facts: Facts) -> Line:
    if "error" in facts:
        return Line("versions", "driver", "problem", facts["error"], NO_ANSWER)
    found = ", ".join(f"{name} {version or 'not installed'}" for name, version in facts.items())
    if None in facts.values():
        return Line("versions", "driver", "problem", found, "install rlhf_ray with its extra `cpu` or `gpu`")
    return Line("versions", "driver", "ok", found)


def _release(name: str, version: str | None) -> str | None:
    """What must agree of a version: not the build (`+cpu`) nor the distribution, nor Python's last digit."""
    if version is None or name == "rlhf_ray":
        return version
    release = version.split("+")[0].split(" ")[0]
    return release.rpartition(".")[0] if name == "Python" else release


def _versions(facts: Facts, driver: Facts) -> Judgement:
    if "error" in driver:
        return "warning", "not compared, for want of the driver's", NO_ANSWER
    other = [name for name in driver if facts.get(name) != driver[name]]
    if not other:
        return "ok", "as the driver's", ""
    found = ", ".join(
        f"{name} {facts.get(name) or 'not installed'}, the driver's is {driver[name] or 'not installed'}"
        for name in other
    )
    if any(_release(name, facts.get(name)) != _release(name, driver[name]) for name in other):
        return "problem", found, "install the same versions on every node and for the driver, by one lock file or image"
    return "warning", found, "install the same build everywhere, unless some nodes are meant to have no GPU"


def _cpu(facts: Facts, told: float) -> Judgement:
    found = f"{facts['cores']:g} cores, Ray was told {told:g}"
    if told > math.ceil(facts["cores"]):
        remedy = (
            f"start Ray with --num-cpus {math.floor(facts['cores']) or 1}: processes that share cores are far slower"
        )
        return "warning", found, remedy
    return "ok", found, ""


def _memory(facts: Facts) -> Judgement:
    used = 1 - facts["available"] / facts["total"]
    found = f"{_gib(facts['available'])} free of {_gib(facts['total'])}"
    remedy = "end what else uses memory here; Ray ends processes of a node that uses more than 95 %"
    if used > MEMORY_USED_PROBLEM:
        return "problem", found, remedy
    return ("warning", found, remedy) if used > MEMORY_USED_WARNING else ("ok", found, "")


def _gpu(facts: Facts, told: float, share: float | None) -> Judgement:
    gpus = facts["gpus"]
    if told > len(gpus):
        found = f"{len(gpus)} GPUs answer, Ray was told {told:g}"
        return "problem", found, f"see what `nvidia-smi` says here, or start Ray with --num-gpus {len(gpus)}"
    if not gpus:
        return "ok", "none", ""
    names = ", ".join(sorted({gpu["name"] for gpu in gpus}))
    found = f"{len(gpus)} x {names}, driver {facts['NVIDIA driver']}, CUDA {facts['CUDA']}"
    if told < len(gpus):
        return "warning", f"{found}; Ray was told {told:g}", "start Ray with --num-gpus to use them all"
    shares = {gpu["index"]: gpu["free"] / gpu["total"] for gpu in gpus if gpu["total"] and gpu["free"] is not None}
    if not shares:
        return "ok", found, ""
    index = min(shares, key=lambda index: shares[index])
    found += f"; least free memory {shares[index]:.0%}, on GPU {index}"
    remedy = f"`nvidia-smi` shows whose processes hold memory of GPU {index}; end them"
    if share is not None and shares[index] < share:
        return "problem", found, f"{remedy}, or lower rollout.gpu_memory_utilization from {share:g}"
    return ("warning", found, remedy) if shares[index] < GPU_FREE_WARNING else ("ok", found, "")


def _shared_memory(facts: Facts, resources: Mapping[str, float]) -> Judgement:
    object_store = resources.get("object_store_memory", 0.0)
    found = f"{_gib(facts['free'])} free of {_gib(facts['total'])} in /dev/shm; object store {_gib(object_store)}"
    larger = "give it more, in a container by --shm-size or a volume in memory at /dev/shm"
    if facts["free"] < SHARED_MEMORY_PROBLEM and resources.get("GPU"):
        return "problem", found, larger
    if facts["total"] < object_store:
        return "warning", found, f"{larger}: Ray's object store does not fit and lies on disk"
    if facts["free"] < SHARED_MEMORY_WARNING:
        return "warning", found, larger
    if object_store < OBJECT_STORE_WARNING:
        return "warning", found, "start Ray with --object-store-memory of 500000000 or more"
    return "ok", found, ""


def _open_files(facts: Facts) -> Judgement:
    soft = facts["soft"]
    found = "no limit" if soft < 0 else f"limit of {soft}"
    remedy = "run `ulimit -n 65536` before `ray start` (or before this command, where it starts Ray itself)"
    if 0 <= soft < OPEN_FILES_PROBLEM:
        return "problem", found, remedy
    return ("warning", found, remedy) if 0 <= soft < OPEN_FILES_WARNING else ("ok", found, "")


def _ray_disk(facts: Facts) -> Judgement:
    found = f"{_gib(facts['free'])} free of {_gib(facts['total'])} at {facts['path']}"
    remedy = "free space, or start Ray with --temp-dir on a larger disk"
    if facts["free"] < RAY_DISK_PROBLEM:
        return "problem", found, remedy
    if 1 - facts["free"] / facts["total"] > DISK_USED_WARNING:
        return "warning", found, f"{remedy}; Ray spills no objects to a disk that is more than 95 % full"
    return "ok", found, ""


def _clock(facts: Facts) -> Judgement:
    offset, uncertainty = facts["offset_s"], facts["uncertainty_s"]
    found = f"{offset:+.3f} s from the driver's, give or take {uncertainty:.3f} s"
    if abs(offset) - uncertainty > CLOCK_WARNING_S:
        return "warning", found, "let a time service (chrony, systemd-timesyncd) set the clock; logs are out of order"
    return "ok", found, ""


def _run_directory(facts: Facts) -> Judgement:
    path = facts["path"]
    shared = "put run.dir on a file system that every node mounts at the same path"
    if not facts["exists"]:
        return "problem", f"{path} is not there", shared
    if not facts["shared"]:
        return "problem", f"{path} is another folder than the driver's of this name", shared
    if facts["refused"]:
        return "problem", f"{path} cannot be written: {facts['refused']}", "give Ray's user the right to write there"
    found = f"{path} is the driver's, {_gib(facts['free'])} free"
    remedy = "free space or change run.dir; each checkpoint holds the model and its optimizer state"
    if facts["free"] < RUN_DISK_PROBLEM:
        return "problem", found, remedy
    return ("warning", found, remedy) if facts["free"] < RUN_DISK_WARNING else ("ok", found, "")


def _models(node: str, facts: Facts) -> list[Line]:
    if "error" in facts:
        return [Line("models", node, "problem", facts["error"], NO_ANSWER)]
    return [Line("models", node, *_model(name, state)) for name, state in facts.items()]


def _model(name: str, state: str) -> Judgement:
    good = {"folder": "is there", "cached": "is in the cache", "hub": "is fetched from the hub, which answers"}
    if state in good:
        return "ok", f"{name} {good[state]}", ""
    if state == "missing":
        return "problem", f"{name} is not there", "name a folder on a shared file system, or copy it to this node"
    if state == "offline":
        found = f"{name} is not in the cache, and HF_HUB_OFFLINE keeps this node off the hub"
        return "problem", found, "fill the cache of this node first, or unset HF_HUB_OFFLINE before `ray start`"
    if state.startswith("no answer"):
        found = f"{name} is not in the cache: {state}"
        return "problem", found, "let this node reach the hub, set HF_ENDPOINT to a mirror, or fill its cache first"
    return "problem", f"{name} holds {state}", "give a complete model folder"


def _tracker(facts: Facts) -> Judgement:
    """Weights & Biases, which the driver alone talks to."""
    if "error" in facts:
        return "warning", facts["error"], "set tracking.wandb to offline, or off"
    if not facts["key"]:
        found = "tracking.wandb is online and WANDB_API_KEY is not set"
        return "problem", found, "set it, or set tracking.wandb to offline or off"
    if facts["refused"]:
        found = f"{facts['url']} does not answer: {facts['refused']}"
        return "warning", found, "the run would record offline; upload it later with `wandb sync`"
    return "ok", f"{facts['url']} answers", ""


def judge_network(backend: str, pairs: Sequence[Exchange], together: Exchange | None) -> list[Line]:
    """Neighbours of the ring, and all nodes at once.

    Args:
        backend: "gloo" or "nccl".
        pairs: every two neighbours.
        together: all nodes, where they have met.
    """
    lines = [_pair(backend, pair) for pair in pairs]
    remedy = _network_remedy(backend, [answer for pair in pairs for answer in pair.answers])
    for node in _cut_off(pairs):
        lines.append(Line("network", node, "problem", "reaches no neighbour, while these reach others", remedy))
    if together is None:
        return lines
    if together.failed:
        found, remedy = _errors(together), _network_remedy(backend, together.answers)
        return [*lines, Line("network", "cluster", "problem", f"all-reduce over {backend}: {found}", remedy)]
    facts, count = together.answers[0], len(together.nodes)
    # What passes each node's link, so that it compares with the link's own rate.
    rate = 2 * (count - 1) / count * facts["bytes"] / facts["all_reduce_s"]
    found = f"all-reduce of {count} nodes over {backend}: {_rate(rate)}, {_latency(facts['small_all_reduce_s'])}"
    return [*lines, Line("network", "cluster", "ok", found)]


def _pair(backend: str, pair: Exchange) -> Line:
    where = " - ".join(pair.nodes)
    if pair.failed:
        return Line("network", where, "problem", _errors(pair), _network_remedy(backend, pair.answers))
    facts = pair.answers[0]
    rate, latency = facts["bytes"] / facts["message_s"], facts["small_message_s"]
    found = f"{backend}: {_rate(rate)}, {_latency(latency)}"
    if rate < BYTES_PER_S_WARNING[backend] or latency > LATENCY_WARNING_S:
        remedy = f"see that {backend.upper()}_SOCKET_IFNAME names the fastest interface and that nothing else uses it"
        return Line("network", where, "warning", found, f"{remedy}; weights and gradients pass here at every step")
    return Line("network", where, "ok", found)


def _cut_off(pairs: Sequence[Exchange]) -> list[str]:
    """Nodes that fail with both neighbours although these do not fail with all of theirs."""
    mine: dict[str, list[Exchange]] = {}
    for pair in pairs:
        for node in pair.nodes:
            mine.setdefault(node, []).append(pair)
    failing = [node for node, own in mine.items() if len(own) > 1 and all(pair.failed for pair in own)]
    return [node for node in failing if not any(set(pair.nodes) <= set(failing) for pair in mine[node])]


def _errors(exchange: Exchange) -> str:
    answers = zip(exchange.nodes, exchange.answers, strict=True)
    return "; ".join(f"{node}: {answer['error']}" for node, answer in answers if "error" in answer)


def _network_remedy(backend: str, answers: Iterable[Facts]) -> str:
    """What to do about answers of which some are errors."""
    errors = [answer for answer in answers if "error" in answer]
    # An error of the collective other than that of waiting for the other node is this node's own: its interface.
    own = any(answer.get("phase") == "collective" and "timed out" not in answer["error"] for answer in errors)
    if not own and any(answer.get("phase") == "rendezvous" for answer in errors):
        return "let the nodes reach each other on all TCP ports (firewall, security group, network policy)"
    return (
        f"set {backend.upper()}_SOCKET_IFNAME to the interface that joins the nodes, on each of them before "
        "`ray start`; see that no host name resolves to 127.0.0.1, and open all TCP ports between the nodes"
    )


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def _latency(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms for 8 bytes"


def judge_placement(stage: str, plan: Plan, available: Mapping[str, float], nodes: list[Place]) -> list[Line]:
    """Whether the processes of a stage fit the cluster, as `rlhf-ray plan` and the run itself decide it.

    Args:
        stage: its name.
        plan: what it asks for.
        available: CPU and GPU that nobody holds now.
        nodes: all nodes, with their labels.
    """
    total = {name: sum(node.amounts[name] for node in nodes) for name in RESOURCE_KEYS}
    remedy = "lower the number of processes or what each takes, or add a node; `rlhf-ray plan` proposes numbers"
    crowded = [f"{words}; {remedy}" for words in crowding(plan, lay_out(plan, nodes)).values()]
    lacks = shortfalls(plan, total) or misfits(plan, nodes) or crowded
    if lacks and plan.autoscaling:
        found = [(f"{stage}, now: {words}", f"{plan.waiting}; or {change}") for words, change in _parts(lacks)]
        return [Line("placement", "cluster", "warning", words, change) for words, change in found]
    if lacks:
        return [Line("placement", "cluster", "problem", f"{stage}: {f}", r) for f, r in _parts(lacks)]
    busy = shortfalls(plan, available)
    if busy:
        deadline = f"{plan.timeout_s:g} s (placement.timeout_s)"
        remedy = f"see `ray status` for who holds the rest; a run waits up to {deadline} for it, and fails then"
        return [Line("placement", "cluster", "warning", f"{stage}, now: {f}", remedy) for f, _ in _parts(busy)]
    needed = ", ".join(f"{plan.needed(name):g} of {amount:g} {name}" for name, amount in total.items())
    return [Line("placement", "cluster", "ok", f"{stage} takes {needed}")]


def _parts(sentences: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What was found and what to change, of sentences that say both."""
    for sentence in sentences:
        found, _, change = sentence.partition("; ")
        yield found, change


def table(lines: Iterable[Line], nodes: int) -> str:
    """The lines for people, of a cluster of so many nodes; what is the same on several of them is said once."""
    rows = [("verdict", "check", "where", "found", "")]
    for line, places in _merged(lines):
        where = ", ".join(places)
        if len(places) > 1 and (line.verdict == "ok" or len(places) == nodes):
            where = f"{len(places)} of {nodes} nodes" if len(places) < nodes else f"all {nodes} nodes"
        rows.append((line.verdict, line.check, where, line.found, line.remedy))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    text = []
    for *cells, found, remedy in rows:
        text.append("  ".join([*map(str.ljust, cells, widths), found]).rstrip())
        if remedy:
            text.append(" " * (sum(widths) + 6) + f"-> {remedy}")
    return "\n".join(text)


def summary(lines: Iterable[Line]) -> str:
    """How many problems and warnings the table has, and what that means."""
    verdicts = [line.verdict for line, _ in _merged(lines)]
    problems, warnings = verdicts.count("problem"), verdicts.count("warning")
    counts = f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    return f"{counts}: {'a run would fail' if problems else 'nothing found that would make a run fail'}"


def _merged(lines: Iterable[Line]) -> list[tuple[Line, list[str]]]:
    """Lines that say the same, once and with their places; those of one check stand together."""
    places: dict[Line, list[str]] = {}
    checks: dict[str, int] = {}
    for line in lines:
        places.setdefault(replace(line, where=""), []).append(line.where)
        checks.setdefault(line.check, len(checks))
    return sorted(places.items(), key=lambda item: checks[item[0].check])


def _gib(count: float) -> str:
    return f"{count / GIB:.3g} GiB"
