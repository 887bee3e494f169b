"""Every command of the pages runs, in a copy of the checkout that has what the commands before it leave.

Commands that would take minutes or the network run in a short form:

* `make TARGET` as `make -n TARGET`;
* `rlhf-ray sft|reward|dpo|ppo|pipeline|generate|submit` with `--dry-run` appended, `rlhf-ray
  demo|doctor|jobs|logs|stop|scale|status|timeline|verify`
  with `--help`, in this process;
* `ray ...` with `--help`, and the `rlhf-ray` command inside `ray job submit ... -- rlhf-ray ...` as above;
* commands that install, and those of programs that talk to a cluster (`kubectl`, `sbatch`, ...), are checked by the
  shell for syntax, and that the files they name are there;
* Python blocks run with `train_ppo` left out: the model that it would leave is there already.
"""

import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlhf_ray.cli import main
from rlhf_ray.demo.data import write_demo_data

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from tiny_models import make_llama

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "cluster/README.md"]
STAGES = ("sft", "reward", "dpo", "ppo", "pipeline", "generate")
# Programs that need what a test has not: a cluster, a daemon, a queue, or the shell that the page's reader types into.
OUTSIDE = ("docker", "kubectl", "helm", "sbatch", "squeue", "chmod", "export")
OTHERS = ("bench", "demo", "doctor", "scale", "status", "timeline", "verify")
JOBS = ("jobs", "logs", "stop")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page, line) for line in lines if line.strip() and not line.startswith("#")]
    return found


def short_forms(words: list[str]) -> list[list[str]]:
    """The commands that the test runs for one of a page; see the module."""
    if words[:3] == ["ray", "job", "submit"]:
        return [["ray", "job", "submit", "--help"], *short_forms(words[words.index("--") + 1 :])]
    if words[0] == "ray":
        return [[*words[:2], "--help"]]
    if words[0] == "make":
        return [["make", "-n", *words[1:]]]
    if words[0] == "rlhf-ray" and words[1] in (*STAGES, "submit"):
        return [words if words[-1] == "--dry-run" else [*words, "--dry-run"]]
    if words[:2] == ["rlhf-ray", "plan"]:
        return [words]
    if words[0] == "python" or (words[0] == "rlhf-ray" and words[1] in (*OTHERS, *JOBS)):
        return [[*words, "--help"]]
    raise AssertionError(f"no rule says how to run {shlex.join(words)!r}")


@functools.cache  # the pages name `ray start` and others many times
def outcome(words: tuple[str, ...]) -> subprocess.CompletedProcess:
    """What came of a program of the environment or the system."""
    program = shutil.which(words[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, words
    return subprocess.run([program, *words[1:]], capture_output=True, text=True, timeout=120, check=False)


def installs(command: str) -> bool:
    return "pip install" in command or "-m venv" in command


def named_files(command: str) -> list[str]:
    return re.findall(r"(?<![\w/.])(?:cluster|configs|requirements)/[\w./]+", command)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with the demonstration's data, and tiny models in place of those that stages leave."""
    folder = tmp_path_factory.mktemp("docs") / "checkout"
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, folder)
    write_demo_data(folder / "runs" / "demo" / "data", seed=0)
    for run in ("smoke/sft", "demo/ppo"):
        make_llama(folder / "runs" / run / "model")
    make_llama(folder / "runs" / "smoke" / "reward" / "model", scalar=True)
    return folder


def test_the_pages_have_commands():
    assert {page for page, _ in commands()} == set(PAGES)
    text = [command for _, command in commands()]
    assert "make demo" in text
    assert "make test" in text
    for stage in (*STAGES, *OTHERS, *JOBS, "submit"):
        assert any(command.startswith(f"rlhf-ray {stage} ") for command in text), stage


def test_the_command_is_installed_with_the_package():
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["rlhf-ray"]
    module, _, name = script.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value[:60].replace("/", "_"))
def test_every_command_runs(page, command, checkout, monkeypatch, capsys):
    for name in named_files(command):
        assert (ROOT / name).is_file(), name
    if installs(command) or command.split()[0] in OUTSIDE:
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)
        return
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("WANDB_API_KEY", "none")
    for words in short_forms(shlex.split(command, comments=True)):
        if words[0] == "rlhf-ray":
            with pytest.raises(SystemExit) as ended:
                main(words[1:])
            assert ended.value.code == 0, f"{words}\n{capsys.readouterr().err}"
            continue
        result = outcome(tuple(words))
        assert result.returncode == 0, f"{words}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


@pytest.mark.system
def test_the_python_example_runs(checkout):
    (example,) = blocks("README.md", "python")
    assert example.count("api.train_ppo(config)") == 1
    script = "from pathlib import Path\n" + example.replace("api.train_ppo(config)", "Path('runs/demo/ppo/model')")
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "dir: runs/from_python" in result.stdout
    assert result.stdout.rstrip().endswith(("stop", "length"))


def test_the_map_names_every_module_and_nothing_else():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"^\| `(rlhf_ray/[\w/]+\.py)` \| \S", text, re.MULTILINE))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "rlhf_ray").rglob("*.py")}
    assert named == {name for name in modules if not name.endswith(("__init__.py", "__main__.py"))}
    for folder in sorted({str(Path(name).parent) for name in named}):
        assert f"| **{folder}/** |" in text, folder


@pytest.mark.parametrize("page", [*PAGES, "docs/architecture.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
