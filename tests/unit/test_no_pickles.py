"""Weights are safetensors, and whatever torch is asked to load may hold nothing but tensors."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "rlhf_ray"
UNPICKLING = {"pickle", "cloudpickle", "dill", "joblib"}


def calls_that_unpickle(source: str) -> list[int]:
    """Lines that could run code out of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            found += [node.lineno for name in names if name.partition(".")[0] in UNPICKLING]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            given = {one.arg: ast.unparse(one.value) for one in node.keywords}
            safe = {"weights_only": "True"} if ast.unparse(node.func) == "torch.load" else {"allow_pickle": "False"}
            found += [] if safe.items() <= given.items() else [node.lineno]
    return found


def test_what_could_run_code_is_seen():
    source = "import pickle\ntorch.load(path)\ntorch.load(path, weights_only=True)\nnp.load(path, allow_pickle=True)"
    assert calls_that_unpickle(source) == [1, 2, 4]


def test_nothing_in_the_package_unpickles_a_file():
    for path in sorted(PACKAGE.rglob("*.py")):
        assert calls_that_unpickle(path.read_text(encoding="utf-8")) == [], path.name
