"""No wait without an end: each for Ray, a process, a thread, an event or a queue names a time limit in the package.

A driver's wait for a process is an `Answer`, whose `result` takes its limit from `Patience`.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "rlhf_ray"
# A wait, and the position at which its time limit may stand without a name; None where it must be named.
WAITS = {
    "ray.get": None,
    "ray.wait": None,
    "subprocess.run": None,
    ".join": 0,
    ".communicate": 1,
    ".wait": 0,
    ".get": 0,
}
# Waits without a limit of their own, and what ends them.
ENDLESS = {
    ("rollout/further_nodes.py", "ray.wait"),  # a thread that ends the process when another node's does
    ("rollout/in_process.py", ".get"),  # the engine's thread has nothing to do; it ends with the process
    ("rollout/gloo_transfer.py", ".wait"),  # gloo's operations have the group's limit, `outgoing` the connection's
    ("driver/saving.py", ".wait"),  # `Saver.wait`, which takes as long as a checkpoint may
    ("stages/run.py", ".wait"),  # the same
    ("algorithms/checks.py", ".get"),  # a context variable
    ("tracking/stall.py", ".get"),  # what a console has captured
}


def waits_without_limit(source: str) -> list[tuple[str, int]]:
    """Name and line of each wait that has no time limit."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value)
        name = f"{owner}.{node.func.attr}" if owner in ("ray", "subprocess") else f".{node.func.attr}"
        if (
            name not in WAITS
            or isinstance(node.func.value, ast.Constant)
            or owner in ("os.path", "os.pathsep", "shlex")
        ):
            continue
        position = WAITS[name]
        named = any(keyword.arg in ("timeout", "timeout_s") for keyword in node.keywords)
        if not named and (position is None or len(node.args) <= position):
            found.append((name, node.lineno))
    return found


def test_a_wait_without_a_limit_is_seen():
    source = "ray.get(ref)\nray.get(ref, timeout=1)\nthread.join()\nthread.join(3)\n', '.join(names)\nray.wait(refs)"
    assert waits_without_limit(source) == [("ray.get", 1), (".join", 3), ("ray.wait", 6)]
    source = "event.wait()\nevent.wait(1)\nqueue.get()\nqueue.get(timeout=1)\nsubprocess.run(['ls'])\nnames.get('key')"
    assert waits_without_limit(source) == [(".wait", 1), (".get", 3), ("subprocess.run", 5)]


def test_every_wait_of_the_package_has_a_limit():
    endless = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        for wait, line in waits_without_limit(path.read_text(encoding="utf-8")):
            endless.add((name, wait))
            assert (name, wait) in ENDLESS, f"{name}, line {line}: {wait} without a time limit"
    assert endless == ENDLESS  # a reason that nothing needs any more is to go
