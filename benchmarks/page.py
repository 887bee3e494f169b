"""Makes docs/performance.md from the results in benchmarks/results.

python benchmarks/page.py
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

HEAD = """# Performance

Made from the files in `benchmarks/results` by `python benchmarks/page.py`. Ratios are taken in one run on the same
machine, both sides in turns unless a section says otherwise; the middle of the measurements stands first, the least and
the largest in brackets.
"""

ROLLOUT = """
## Rollout

Sampling through the engines of a run, beside vLLM alone (`LLM.generate`, the same requests with their seeds and
log-probabilities, threads and limits), and beside vLLM alone without seeds and log-probabilities ("plain"). Time runs
from handing over the requests to the last finished response in the driver. Latencies count from the arrival at the
engine, waiting included, and come from one further measurement. Weights are random.
"""

ITERATION = """
## An iteration of PPO

A run of PPO on random weights, beside what the same cores need without this system: vLLM alone for the responses, plain
torch for a forward pass of reference, reward model and critic and for an optimizer step of policy and critic, one after
the other. W1: Llama, hidden 256, 6 layers, vocabulary 4096; 64 prompts of 32 tokens, 128 new ones each. W2: W1 with
log-normal lengths (median 48, sigma 0.9, at most 384). W3: W1 at 100 million parameters, 16 prompts. GAE, KL in the
reward, one epoch, one optimizer step. "Nobody busy": no process but the driver has a span open. "Hidden": the share of
the scorers' work after which nobody waited. The bare work is done once before each iteration.
"""

AHEAD = """
## Sampling ahead of training

Iterations with `ppo.max_staleness` above 0, beside the same without, measured before. The engine has a core of its own
(`placement.cores`), trainers and scorers share another. At best an iteration takes as long as the longer of sampling
and of all the rest.
"""

CHECKPOINTS = """
## Checkpoints

Iterations with a checkpoint after each: policy and critic with their optimizers' states. "Waited": until the ranks have
copied their state in memory, and until the checkpoint before is complete. Files are written, sealed and renamed while
the next iteration goes on, on the same cores.
"""

PEERS = """
## Beside TRL

Workload W1 in fp32 here and with the PPO trainer of TRL (`trl.experimental.ppo`), in turns, a block of iterations each,
on the same cores. Both do the same: 128 sampled tokens for each prompt, which no end of a sequence cuts short, scores,
values and log-probabilities of the reference, GAE, and one optimizer step of policy and critic. TRL samples with
transformers' `generate`, and does one thing after the other in one process on all cores; it runs without evaluation,
saving, recomputation of activations and reports, and in the fastest of the batches that were tried (below). The ratio
is taken block by block; seconds run from the end of one iteration to that of the next.
"""

TRANSFER = """
## Weight transfer

New weights from the trainer to an idle engine, beside one copy of the same bytes within a process. A transfer is all of
it: the engine stops, reads the buckets from memory that it shares with the trainer, packs each layer for its kernels,
answers the probe, and serves. What does not depend on the size is the first row's.
"""

PACKING = """
## Different lengths

Optimizer steps of the policy on responses of different lengths beside as many of their mean length, in turns. Real
tokens alone count, those of prompts and responses.
"""

SCALING = """
## Many engines, one driver

The driver's side of sampling alone: the pool, Ray's streams and the trajectories are those of a run, the engines only
wait as long as their responses would take. CPU time is all that the driver's process took, Ray's threads included. All
is sampled twice, one after the other; memory is the most that was resident above what was before the requests were
made, and the last column is how much more that was at the second time.
"""

THROUGHPUT = """
## Throughput on paper

What `rlhf-ray plan --throughput` foretells of an iteration ([how](throughput.md)), beside the middle of the iterations
of a run. Speeds are known from the runs marked so, which have one engine and fp32; of the others the estimate knows the
configuration and the lengths of the responses alone. "Middle": 25 million parameters, 32 prompts.
"""

STALENESS = """
## Learning from stale samples

PPO of [the demonstration](demo.md) at several `ppo.max_staleness`, with the importance weights of `ppo.importance_cap`
("corrected") and without (`null`: the clipped ratio is taken against the policy before the update all the same, and
nothing makes up for the weights that sampled). Data, SFT and reward model are the same in all runs; a seed is that of
sampling and of the order of prompts. Setting `shipped` is `configs/demo.yaml`; `fast` is the same with five times the
learning rate of the policy and twice the minibatches, so that weights differ more between two updates. How stale tokens
were and their mismatch are means after the tenth iteration. The last three columns are of the policy at the end: its
replies to 1,024 held-out prompts, by the gold score, which trains nothing, by the reward model, and in KL divergence
from the SFT model. The mean of the seeds, the least and the largest in brackets.
`python benchmarks/staleness.py` makes the runs that are missing, this table's file and the drawing, whose curves are
means over the seeds and over three iterations; the first panel shows responses by the weights that sampled them, so
that the delay itself is left out.

![Learning from stale samples](staleness.svg)
"""

SOAK = """
## Memory over a run

Resident memory of each process of PPO of [the demonstration](demo.md), with that of its children, as the run goes on.
"Growth" is the slope of a line through the second half of the iterations, in which processes grow in single steps of a
few MiB. Kernels that oneDNN keeps for each shape it meets had it grow by 70 MiB in 100 iterations of the second half
before they were limited (`runtime.cluster.ONEDNN_KERNELS`). `python benchmarks/soak.py`.
"""

MEMORY = """
## Memory

What `rlhf-ray plan` foretells of a process, beside the peak that it was measured to take above what its libraries take
(an engine: above one of a tiny model with little cache). On a CPU both are memory in use. What the allocator holds for
the next pass comes on top of it: the first trainer below, with 2.28 GiB in use, was resident with 3.24 GiB as glibc is
set by default, and with 3.45 GiB as the processes of a run are.
`python benchmarks/memory.py --out benchmarks/results/memory.json`.
"""


def rollout(report: dict[str, Any]) -> list[str]:
    """One run of `rlhf-ray bench rollout`."""
    machine = ", ".join(f"{node['cpus']:g} cores, {node['gpus']} GPUs" for node in report["hardware"])
    lines = [
        f"\n`{report['command']}`\n",
        f"{report['processor']}, {machine}; {_versions(report['versions'])}; commit {report['commit']}.\n",
    ]
    names = ("engines", "at once", "prompt", "response", "tokens/s", "share of bare vLLM", "of plain")
    names += ("first token, s", "latency p50, p95, p99, s", "idle", "cache", "preempted")
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
            f"{row['share_of_plain']['median']:.2f}",
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
    names = ("workload", "precision", "cores of the engine", "iteration, s", "generate", "score", "train", "transfer")
    names += ("bare work, s", "iteration / bare", "nobody busy", "scoring hidden")
    lines = [*_commands(reports), *_header(*names)]
    for report in reports:
        parts = [f"{report['parts_s'][name]['median']:.2f}" for name in ("generate", "score", "train", "transfer")]
        cells = (
            report["workload"].upper(),
            report["dtype"],
            _cores(report),
            _spread(report["iteration_s"], "{:.2f}"),
            *parts,
            _spread(report["bare_s"], "{:.2f}"),
            _spread(report["share_of_bare"], "{:.2f}"),
            _spread(report["nobody_busy"], "{:.1%}"),
            _spread(report["scoring_hidden"], "{:.0%}"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _cores(report: dict[str, Any]) -> str:
    """Where an engine has a core of its own and the others another, that is said; all use all cores otherwise."""
    return "one, others another" if "placement.cores" in report["command"] else "all"


def checkpoints(reports: list[dict[str, Any]]) -> list[str]:
    """Runs of `rlhf-ray bench iteration` with a checkpoint after each iteration, a row each."""
    names = ("workload", "precision", "iteration, s", "waited, s", "waited / iteration")
    lines = [*_commands(reports), *_header(*names)]
    for report in reports:
        cells = [report["workload"].upper(), report["dtype"], _spread(report["iteration_s"], "{:.2f}")]
        cells += [_spread(report["parts_s"]["checkpoint"], "{:.3f}"), _spread(report["checkpoint_share"], "{:.1%}")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def soak(report: dict[str, Any]) -> list[str]:
    """A run of `benchmarks/soak.py`, a row for each process."""
    lines = [*_commands([report]), f"\n{report['iterations']} iterations."]
    lines += _header("process", "MiB after a tenth of them, two tenths, ... all", "growth, MiB in 100 iterations")
    for name, row in report["processes"].items():
        curve = ", ".join(f"{one:.0f}" for one in row["tenths_mib"])
        lines.append(f"| {name} | {curve} | {row['growth_mib_per_100']:.1f} |")
    return lines


def ahead(reports: list[dict[str, Any]]) -> list[str]:
    """Runs of `rlhf-ray bench iteration` that sample ahead of training, a row each."""
    names = ("workload", "precision", "ahead", "iteration, s", "in turns, s", "sampling, s", "all the rest, s")
    lines = [*_commands(reports), *_header(*names, "iteration / the longer")]
    for report in reports:
        turns = report["in_turns_s"]
        cells = (
            report["workload"].upper(),
            report["dtype"],
            report["max_staleness"],
            _spread(report["iteration_s"], "{:.2f}"),
            _spread(turns["iteration"], "{:.2f}"),
            f"{turns['generate']:.2f}",
            f"{turns['rest']:.2f}",
            _spread(report["share_of_longer"], "{:.2f}"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def peers(reports: list[dict[str, Any]]) -> list[str]:
    """Runs of `benchmarks/trl_ppo.py`, a row each."""
    names = ("workload", "precision", "TRL, s", "its sampling, s", "cores it had", "here, s", "here / TRL")
    commands = zip(_commands(reports), reports, strict=True)
    lines = [f"{text}; {_versions(one['peer_versions'])}" for text, one in commands]
    lines += _header(*names)
    for report in reports:
        cells = [report["workload"].upper(), report["dtype"]]
        figures = ("peer_s", "peer_generate_s", "peer_cores_used", "iteration_s", "share_of_peer")
        cells += [_spread(report[name], "{:.2f}") for name in figures]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def peer_settings(reports: list[dict[str, Any]]) -> list[str]:
    """Runs of `benchmarks/trl_ppo.py --try-settings`."""
    names = ("batch for sampling and scoring", "micro-batch", "memory is kept as here", "TRL, s", "its sampling, s")
    lines = [*_commands(reports), *_header(*names)]
    for row in (row for report in reports for row in report["rows"]):
        cells = [str(row["rollout_batch"]), str(row["micro_batch"]), "yes" if row["kept_memory"] else "no"]
        cells += [_spread(row[name], "{:.2f}") for name in ("iteration_s", "generate_s")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _spread(values: dict[str, float], form: str) -> str:
    return f"{form.format(values['median'])} ({form.format(values['min'])} to {form.format(values['max'])})"


def transfer(reports: list[dict[str, Any]]) -> list[str]:
    """Runs of `rlhf-ray bench transfer`, a row each, the smallest model first."""
    lines = [*_commands(reports), *_header("parameters, million", "MiB", "transfer, s", "copy, s", "transfer / copy")]
    for report in sorted(reports, key=lambda one: one["bytes"]):
        cells = [f"{report['parameters'] / 1e6:.1f}", f"{report['bytes'] / 2**20:.0f}"]
        cells += [_spread(report[name], "{:.3f}") for name in ("transfer_s", "copy_s")]
        lines.append("| " + " | ".join([*cells, _spread(report["transfer_per_copy"], "{:.1f}")]) + " |")
    return lines


def packing(reports: list[dict[str, Any]]) -> list[str]:
    """Runs of `rlhf-ray bench packing`, a row each."""
    names = ("responses", "of tokens", "different, tokens/s", "equal, tokens/s", "different / equal")
    lines = [*_commands(reports), *_header(*names)]
    for report in reports:
        cells = [str(report["responses"]), report["response_tokens"]]
        cells += [_spread(report["tokens_per_s"][name], "{:.0f}") for name in ("drawn", "equal")]
        lines.append("| " + " | ".join([*cells, _spread(report["share_of_equal"], "{:.2f}")]) + " |")
    return lines


def scaling(reports: list[dict[str, Any]]) -> list[str]:
    """Runs of `rlhf-ray bench scaling`."""
    names = ("engines", "under way", "responses/s", "driver's CPU, ms a response", "share of a core")
    lines = [*_commands(reports), *_header(*names, "memory, KiB a response under way", "again, MiB")]
    for row in (row for report in reports for row in report["rows"]):
        cells = [row["engines"], row["in_flight"], f"{row['trajectories_per_s']:.0f}"]
        cells += [f"{row['driver_cpu_ms_per_trajectory']:.2f}", f"{row['driver_cpu_share']:.0%}"]
        cells += [f"{row['memory_growth_kib_per_request']:.1f}", f"{row['memory_growth_again_mib']:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def staleness(report: dict[str, Any]) -> list[str]:
    """Runs of `benchmarks/staleness.py`, a row for each kind, over its seeds."""
    before = report["sft"]
    lines = [*_commands([report]), f"\nThe SFT model: gold {before['gold']:.3f}, learned score {before['score']:.2f}."]
    names = ("`max_staleness`", "corrected", "updates behind, mean", "most", "KL to the sampler, nats a token")
    names += ("weights cut", "masked", "gold", "learned score", "KL to SFT, nats a reply")
    for setting in dict.fromkeys(row["setting"] for row in report["rows"]):
        lines += [f"\nSetting `{setting}`:", *_header(*names)]
        for row in (one for one in report["rows"] if one["setting"] == setting):
            training, held_out, stale = row["training"], row["held_out"], row["staleness"] > 0
            cells = [str(row["staleness"]), "" if not stale else "yes" if row["corrected"] else "no"]
            cells += [f"{training['staleness_mean']['mean']:.2f}", f"{training['staleness_max']['max']:.0f}"]
            cells.append(f"{training['off_policy_kl']['mean']:.4f}")
            cells += [_share(training[name]) for name in ("truncated", "masked")]
            cells.append(_seeds(held_out["gold"], "{:.3f}"))
            cells += [_seeds(held_out[name], "{:.2f}") for name in ("score", "kl")]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _share(values: dict[str, float] | None) -> str:
    return "" if values is None else f"{values['mean']:.1%}"


def _seeds(values: dict[str, float], form: str) -> str:
    """The mean of the seeds, the least and the largest in brackets."""
    return f"{form.format(values['mean'])} ({form.format(values['min'])} to {form.format(values['max'])})"


def _commands(reports: list[dict[str, Any]]) -> list[str]:
    return [f"\n`{one['command']}`, {one['processor']}, commit {one['commit']}" for one in reports]


def _header(*names: str) -> list[str]:
    return ["", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


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


def throughput(report: dict[str, Any]) -> list[str]:
    """One run of `benchmarks/throughput.py`."""
    lines = [
        f"\n`{report['command']}`, {report['processor']}, commit {report['commit']}. Largest deviation of what was "
        f"foretold {report['largest_deviation']:.1%}."
    ]
    lines += _header("workload", "changes", "speeds", "measured, s", "foretold, s", "ratio")
    for known, rows in (("known", report["measured"]), ("", report["foretold"])):
        for row in rows:
            took = f"{median(row['measured_s']):.2f} ({min(row['measured_s']):.2f} to {max(row['measured_s']):.2f})"
            cells = [row["workload"].capitalize(), ", ".join(row["overrides"]), known, took]
            cells += [f"{row['estimated_s']:.2f}", f"{row['ratio']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
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
    saved = [report for report in iterations if "run.checkpoint_every=1" in report["command"].split()]
    in_turns = [report for report in iterations if "bare_s" in report and report not in saved]
    if in_turns:
        lines += [ITERATION.rstrip(), *iteration(in_turns)]
    if saved:
        lines += [CHECKPOINTS.rstrip(), *checkpoints(saved)]
    sampling_ahead = [report for report in iterations if "in_turns_s" in report]
    if sampling_ahead:
        lines += [AHEAD.rstrip(), *ahead(sampling_ahead)]
    for name, head, table in (
        ("peers", PEERS, peers),
        ("peer settings", "", peer_settings),
        ("transfer", TRANSFER, transfer),
        ("packing", PACKING, packing),
        ("scaling", SCALING, scaling),
    ):
        found = [report for report in reports.values() if report.get("benchmark") == name]
        lines += [*([head.rstrip()] if head else []), *table(found)] if found else []
    if "throughput" in reports:
        lines += [THROUGHPUT.rstrip(), *throughput(reports["throughput"])]
    if "staleness" in reports:
        lines += [STALENESS.rstrip(), *staleness(reports["staleness"])]
    if "soak" in reports:
        lines += [SOAK.rstrip(), *soak(reports["soak"])]
    lines += [MEMORY.rstrip(), *memory(reports["memory"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
