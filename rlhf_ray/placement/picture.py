"""An overview as text for people and as plain values for programs."""

from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_ray.placement.checks import Contents
from rlhf_ray.placement.inventory import Node
from rlhf_ray.placement.memory import GIB, PARTS, Estimate
from rlhf_ray.placement.overview import Overview, Problem
from rlhf_ray.placement.plan import RESOURCE_KEYS

BAR = 24
MOST_RUNS = 6


def as_values(found: list[Overview], nodes: list[Node]) -> dict[str, Any]:
    """Everything of the overviews, sizes in bytes.

    `memory` is that of one process of each group at its own peak; groups that take turns on a GPU do not have theirs
    at the same time, so what a GPU needs is under `gpus`.
    """
    return {
        "fits": not any(one.found for one in found),
        "nodes": [node.model_dump() for node in nodes],
        "stages": [
            {
                "stage": one.stage,
                "placement_groups": [
                    {
                        "strategy": strategy,
                        "bundles": [one.plan.bundles[index] for index in bundles],
                        "groups": [list(one.plan.groups_of()[index]) for index in bundles],
                    }
                    for strategy, bundles in one.plan.parts()
                ],
                "labels": one.plan.labels,
                "processes": [asdict(seat) for seat in one.layout.seats],
                "joining_later": one.plan.later,
                "memory": {
                    group: {**each.parts, "total": each.total, "offloaded": each.offloaded, "at_rest": each.at_rest}
                    for group, each in one.estimates.items()
                },
                "gpus": _gpus_as_values(one, nodes),
                "problems": [_with_change(problem) for problem in one.found if not problem.waits],
                "waits": [_with_change(problem) for problem in one.found if problem.waits],
                "notes": one.notes,
            }
            for one in found
        ],
    }


def _with_change(problem: Problem) -> dict[str, Any]:
    return {"words": problem.words, "change": list(problem.change)}


def _gpus_as_values(one: Overview, nodes: list[Node]) -> list[dict[str, Any]]:
    """What is on each GPU that is used, and its memory by part at the turn that takes most."""
    values = []
    for (index, gpu), contents in one.contents.items():
        memory = nodes[index].gpu_memory_gib
        parts = one.on_gpu(contents, memory)
        values.append(
            {
                "node": index,
                "gpu": gpu,
                "processes": dict(contents),
                "memory": None if memory is None else memory * GIB,
                "needed": sum(parts.values()),
                "parts": parts,
                # Groups without an estimate, which `needed` leaves out.
                "unknown": [group for group, _ in contents if group not in one.on(memory)],
            }
        )
    return values


def draw(found: list[Overview], nodes: list[Node], console: Console) -> None:
    """Print the overviews: groups with their memory by part, nodes with what sits on them, problems."""
    for one in found:
        console.print(f"[bold]{one.stage}[/bold]")
        console.print(_groups(one))
        for line in _bundles(one):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for line in _joining(one):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for line in _nodes(one, nodes):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for note in one.notes:
            console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
        for problem in one.problems:
            console.print(f"problem: {problem}", markup=False, highlight=False, soft_wrap=True)
        for wait in one.waits:
            console.print(f"not yet: {wait}", markup=False, highlight=False, soft_wrap=True)
        if not one.found:
            console.print("It fits." if not one.notes else "It fits as far as is known.")
        console.print()


def _groups(one: Overview) -> Table:
    """A row a group: processes, what each takes, and its peak memory by part."""
    parts = [part for part in PARTS if any(each.parts.get(part) for each in one.estimates.values())]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("group", no_wrap=True)
    offloads = any(each.offloaded for each in one.estimates.values())
    for name in ("processes", "CPU each", "GPU each", "GiB each", *parts, *["offloaded"] * offloads):
        table.add_column(name, justify="right", no_wrap=True)
    for group in one.plan.groups:
        each, taken = one.estimates.get(group), {name: one.plan.share(group, name) for name in RESOURCE_KEYS}
        sizes = ["?" if each is None else _gib(each.total)]
        sizes += ["" if each is None else _gib(each.parts.get(part, 0.0)) for part in parts]
        sizes += ["" if each is None else _gib(each.offloaded)] * offloads
        nodes = one.plan.split.get(group, 1)
        later = one.plan.later.get(group, 0)
        processes = f"{one.plan.processes(group)}" + (f" of {one.plan.processes(group) + later}" if later else "")
        processes += f" on {nodes} nodes each" if nodes > 1 else ""
        table.add_row(group, processes, *(f"{amount:g}" for amount in taken.values()), *sizes)
    return table


def _bundles(one: Overview) -> list[str]:
    """A line for each placement group: Ray's strategy, and how many bundles of which processes."""
    lines = []
    for strategy, indices in one.plan.parts():
        kinds: dict[str, int] = {}
        for index in indices:
            amounts = ", ".join(f"{amount:g} {name}" for name, amount in one.plan.bundles[index].items())
            kind = f"{' with '.join(one.plan.groups_of()[index])} ({amounts})"
            kinds[kind] = kinds.get(kind, 0) + 1
        lines.append(f"{strategy}: " + "; ".join(f"{count} x {kind}" for kind, count in kinds.items()))
    return lines


def _joining(one: Overview) -> list[str]:
    """What is not drawn since it joins later."""
    return [
        f"{group}: the {one.plan.processes(group)} to start with (rollout.min_engines) of "
        f"{one.plan.processes(group) + later} (rollout.engines) are drawn; the others join as nodes have room"
        for group, later in one.plan.later.items()
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}" if size else "-"


def _nodes(one: Overview, nodes: list[Node]) -> list[str]:
    """A block of lines a node; neighbours that look alike are one block."""
    by_node: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {index: {} for index in range(len(nodes))}
    for seat in one.layout.seats:
        groups = by_node[seat.node].setdefault(seat.gpus, {})
        groups.setdefault(seat.group, []).append(seat.rank)

    def look(index: int) -> Any:
        node = nodes[index]
        counts = {gpus: {group: len(r) for group, r in groups.items()} for gpus, groups in by_node[index].items()}
        return node.gpus, node.gpu_memory_gib, node.cpus, node.memory_gib, counts

    lines = []
    for _, alike in groupby(range(len(nodes)), key=look):
        block = list(alike)
        first, last = nodes[block[0]], nodes[block[-1]]
        name = first.name if len(block) == 1 else f"{first.name} to {last.name} ({len(block)} nodes)"
        lines.append(f"{name}: {_kind(first)}")
        merged: dict[tuple[int, ...], dict[str, list[int]]] = {}
        for index in block:
            for gpus, groups in by_node[index].items():
                for group, ranks in groups.items():
                    merged.setdefault(gpus, {}).setdefault(group, []).extend(ranks)
        lines += _seats(one, first, merged, len(block))
        if not merged:
            lines.append("  free")
    return lines


def _kind(node: Node) -> str:
    memory = "unknown memory" if node.gpu_memory_gib is None else f"{node.gpu_memory_gib:g} GiB"
    gpus = f"{node.gpus} GPUs of {memory}, " if node.gpus else ""
    main = "" if node.memory_gib is None else f", {node.memory_gib:.0f} GiB"
    labels = "".join(f", {name}={value}" for name, value in node.labels.items() if not name.startswith("ray.io/"))
    return f"{gpus}{node.cpus:g} CPUs{main}{labels}"


def _seats(one: Overview, node: Node, merged: dict[tuple[int, ...], dict[str, list[int]]], num_nodes: int) -> list[str]:
    """Lines of one block: seats on GPUs in the order of the GPUs, those without a GPU last."""
    lines = []
    single = {gpus: groups for gpus, groups in merged.items() if len(gpus) == 1}
    shared = [(gpus[0], tuple(groups)) for gpus, groups in sorted(single.items())]
    for names, run in groupby(shared, key=lambda item: item[1]):
        gpus = [gpu for gpu, _ in run]
        who = ", ".join(f"{group} {_ranks(r for gpu in gpus for r in single[gpu,][group])}" for group in names)
        mix = tuple((group, len(single[gpus[0],][group]) // num_nodes or 1) for group in names)
        lines.append(f"  GPU {_ranks(gpus):7} {_bar(one, mix, node.gpu_memory_gib)}  {who}")
    for several, groups in sorted(item for item in merged.items() if len(item[0]) > 1):
        who = ", ".join(f"{group} {_ranks(ranks)}" for group, ranks in groups.items())
        mix = tuple((group, 1) for group in groups)
        lines.append(f"  GPU {_ranks(several):7} {_bar(one, mix, node.gpu_memory_gib)}  {who}")
    for group, ranks in merged.get((), {}).items():
        size = one.estimates.get(group)
        lines.append(f"  CPU         {_each(size)}  {group} {_ranks(ranks)}")
    return lines


def _each(size: Estimate | None) -> str:
    return f"{'? GiB each' if size is None else f'{size.total / GIB:.2f} GiB each':{BAR + 20}}"


def _bar(one: Overview, contents: Contents, memory_gib: float | None) -> str:
    """Memory that a GPU's contents use as a bar, with the figures."""
    size = sum(one.on_gpu(contents, memory_gib).values())
    if memory_gib is None or not size:
        return f"{'memory unknown':{BAR + 20}}"
    share = size / (memory_gib * GIB)
    filled = min(BAR, round(share * BAR))
    mark = "!" if share > 1 else " "
    return f"{'█' * filled}{'░' * (BAR - filled)}{mark}{size / GIB:7.1f} of {memory_gib:<7g}"


def _ranks(numbers: Iterable[int]) -> str:
    """Numbers with runs shortened, 0-3,7, and many of them to the first and the last."""
    found = []
    for _, run in groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        found.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return ",".join(found) if len(found) <= MOST_RUNS else f"{found[0]},{found[1]}..{found[-1]}"
