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

ITERATION = """
## An iteration of PPO

A run of PPO on random weights, beside what the same cores need without this system: vLLM alone for the responses, plain
torch for a forward pass of reference, reward model and critic and for an optimizer step of policy and critic, one after
the other. W1: Llama, hidden 256, 6 layers, vocabulary 4096; 64 prompts of 32 tokens, 128 new ones each. W2: W1 with
log-normal lengths (median 48, sigma 0.9, at most 384). W3: W1 at 100 million parameters, 16 prompts. GAE, KL in the
reward, one epoch, one optimizer step. "Nobody busy": no process but the driver has a span open. "Hidden": the share of
the scorers' work after which nobody waited. The middle of the iterations, the least and the largest in brackets.
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


def iteration(reports: list[dict[str, Any]]) -> list[str]:
    """Runs of `rlhf-ray bench iteration`, a row each, and what the bare work is made of."""
    lines: list[str] = []
    for report in reports:
        lines.append(f"\n`{report['command']}`, {report['processor']}, commit {report['commit']}")
    names = ("workload", "precision", "ahead", "iteration, s", "generate", "score", "train", "transfer")
    names += ("bare work, s", "iteration / bare", "nobody busy", "scoring hidden")
    lines += ["", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for report in reports:
        parts = [f"{report['parts_s'][name]['median']:.2f}" for name in ("generate", "score", "train", "transfer")]
        cells = (
            report["workload"].upper(),
            report["dtype"],
            report["max_staleness"],
            _spread(report["iteration_s"], "{:.2f}"),
            *parts,
            _spread(report["bare_s"], "{:.2f}"),
            _spread(report["share_of_bare"], "{:.2f}"),
            _spread(report["nobody_busy"], "{:.1%}"),
            _spread(report["scoring_hidden"], "{:.0%}"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _spread(values: dict[str, float], form: str) -> str:
    return f"{form.format(values['median'])} ({form.format(values['min'])} to {form.format(values['max'])})"


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
    iterations = [report for report in reports.values() if report.get("benchmark") == "iteration"]
    if iterations:
        lines += [ITERATION.rstrip(), *iteration(iterations)]
    lines += [MEMORY.rstrip(), *memory(reports["memory"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
