"""What a cluster has: its nodes, from a file, from Ray, or this machine. Light: imports neither torch nor ray."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from rlhf_ray.config.load import read_mapping, validated
from rlhf_ray.config.problems import Problems
from rlhf_ray.config.sections import Section

GIB = 2**30

# Memory in GiB by Ray's accelerator type, where one type means one size.
GPU_MEMORY_GIB = {"H100": 79.6, "H200": 140.4, "B200": 178.4, "L4": 22.5, "L40S": 44.5, "A10G": 22.5, "T4": 15.0}


class NodeItem(Section):
    """Nodes of one kind."""

    name: str = Field(min_length=1, description="Name; several nodes are numbered, as in `gpu-0`.")
    count: int = Field(default=1, ge=1, description="How many there are.")
    cpus: float = Field(gt=0, description="CPU cores of each.")
    gpus: int = Field(default=0, ge=0, description="GPUs of each.")
    gpu_memory_gib: float | None = Field(default=None, gt=0, description="Memory of each GPU in GiB.")
    memory_gib: float | None = Field(default=None, gt=0, description="Main memory of each in GiB.")
    labels: dict[str, str] = Field(default_factory=dict, description="Ray labels of each.")

    @model_validator(mode="after")
    def _check(self):
        problems = Problems()
        if self.gpus and self.gpu_memory_gib is None:
            problems.add("gpu_memory_gib", f"not given, but `gpus` is {self.gpus}; set it, for example to 80")
        problems.check()
        return self


class InventoryFile(Section):
    """The file that `rlhf-ray plan --inventory` reads."""

    nodes: list[NodeItem] = Field(min_length=1, description="The nodes, by kind.")


class Node(Section):
    """One node.

    Attributes:
        gpu_memory_gib: of each GPU; None where it is not known.
        memory_gib: main memory; None where it is not known.
    """

    name: str
    cpus: float
    gpus: int = 0
    gpu_memory_gib: float | None = None
    memory_gib: float | None = None
    labels: dict[str, str] = Field(default_factory=dict)

    @property
    def amounts(self) -> dict[str, float]:
        """What Ray counts of it."""
        return {"CPU": self.cpus, "GPU": float(self.gpus)}


def load_inventory(path: str | Path) -> list[Node]:
    """The nodes that a YAML file lists, in its order.

    Raises:
        ConfigError: the file cannot be read or is wrong.
    """
    values = read_mapping(path, "a list of nodes below `nodes:`")
    nodes = []
    for item in validated(InventoryFile, values, str(path)).nodes:
        shared = item.model_dump(exclude={"name", "count"})
        names = [item.name] if item.count == 1 else [f"{item.name}-{i}" for i in range(item.count)]
        nodes += [Node(name=name, **shared) for name in names]
    return nodes


def this_machine() -> list[Node]:
    """The machine this process runs on, as Ray would count it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    gpus = _local_gpus()
    smallest = min(gpus) if gpus else None
    cpus = float(len(os.sched_getaffinity(0)))
    return [Node(name="this machine", cpus=cpus, gpus=len(gpus), gpu_memory_gib=smallest, memory_gib=memory)]


def _local_gpus() -> list[float]:
    """Memory in GiB of each GPU here, as its driver tells; empty without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return [float(line) / 1024 for line in found.stdout.split()] if found.returncode == 0 else []


def node_from_ray(entry: Mapping[str, Any]) -> Node:
    """One living entry of `ray.nodes()`.

    A GPU's memory follows from the accelerator type among the node's labels; other types leave it unknown.
    """
    resources, labels = entry["Resources"], dict(entry.get("Labels") or {})
    kind = labels.get("ray.io/accelerator-type", "")
    return Node(
        name=entry["NodeManagerAddress"],
        cpus=resources.get("CPU", 0.0),
        gpus=int(resources.get("GPU", 0.0)),
        gpu_memory_gib=GPU_MEMORY_GIB.get(kind),
        memory_gib=resources.get("memory", 0.0) / GIB or None,
        labels=labels,
    )
