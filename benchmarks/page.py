"""Makes docs/performance.md from the results in benchmarks/results.

python benchmarks/page.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

HEAD = """# Performance

Made from the files in `benchmarks/results` by `python benchmarks/page.py`. Ratios are taken in one run, both sides in
turns on the same machine; the middle of the measurements stands first, the least and the largest in brackets.
"""

ROLLOUT = """
## Rollout

Sampling through the engines of a run, beside vLLM alone (`LLM.generate`, the same requests, threads and limits, without
seeds and log-probabilities). Time runs from handing over the requests to the last finished response in the driver.
Latencies count from the arrival at the engine, waiting included. Weights are random.
"""

MEMORY = """
## Memory

What `rlhf-ray plan` foretells of a process, beside the peak that it was measured to take above what its libraries take
(an engine: above one of a tiny model with little cache).
`python benchmarks/memory.py --out benchmarks/results/memory.json`.
"""


def rollout(report: dict[str, Any]) -> list[str]:
    """One run of `rlhf-ray bench rollout`."""
    machine = ", ".join(f"{node['cpus']:g} cores, {node['gpus']} GPUs" for node in report["hardware"])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"\n`{report['command']}`\n",
        f"{report['processor']}, {machine}; {versions}; commit {report['commit']}.\n",
    ]
    names = ("engines", "at once", "prompt", "response", "tokens/s", "share of bare vLLM", "first token, s")
    names += ("latency p50, p95, p99, s", "idle", "cache", "preempted")
    lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in report["rows"]:
        rate, share, latency = row["generated_tokens_per_s"], row["share_of_bare"], row["latency_s"]
        cells = (
            row["engines"],
            row["max_concurrency"],
            row["prompt_tokens"],
            row["response_tokens"],
            f"{rate['median']:.0f} ({rate['min']:.0f} to {rate['max']:.0f})",
            f"{share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f})",
            f"{row['first_token_s']['p50']:.2f}",
            ", ".join(f"{latency[name]:.2f}" for name in ("p50", "p95", "p99")),
            f"{row['idle_share']:.1%}",
            f"{row['kv_cache_peak']:.0%}",
            row["preemptions"],
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def memory(report: dict[str, Any]) -> list[str]:
    """One run of `benchmarks/memory.py`."""
    lines = [f"\n{report['hardware']}, torch {report['torch']}. Largest deviation {report['largest_deviation']:.1%}.\n"]
    lines.append("| process | of | ZeRO | precision | recomputed | at once | measured, GiB | foretold | ratio |")
    lines.append("|" + "---|" * 9)
    for cell in report["cells"]:
        if "head" in cell:
            recomputed = "yes" if cell["checkpointing"] else "no"
            kind = [f"trainer, {cell['head']}", cell["ranks"], cell["zero_stage"], cell["dtype"], recomputed]
            kind.append(f"{cell['tokens']} tokens")
        elif "tokens" in cell:
            kind = [cell["group"], 1, "", cell["dtype"], "", f"{cell['tokens']} tokens"]
        else:
            responses = f"{cell['max_concurrency']} responses, {cell['kv_cache_gib']:g} GiB of cache"
            kind = ["engine", 1, "", cell["dtype"], "", responses]
        figures = [f"{cell[name]:.2f}" for name in ("measured_gib", "estimated_gib", "ratio")]
        lines.append("| " + " | ".join(map(str, [*kind, *figures])) + " |")
    return lines


def page() -> str:
    """The text of docs/performance.md."""
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    lines = [HEAD.rstrip()]
    measured = [report for report in reports.values() if report.get("benchmark") == "rollout"]
    if measured:
        lines.append(ROLLOUT.rstrip())
    for report in measured:
        lines += rollout(report)
    lines += [MEMORY.rstrip(), *memory(reports["memory"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
