"""What a job uploads and what it refuses to upload, and the command around it up to where a cluster is called."""

import os
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.cli import main
from rlhf_ray.config import from_dict, load_config
from rlhf_ray.errors import ConfigError, PackageError
from rlhf_ray.jobs import package
from rlhf_ray.jobs.package import CONFIG_NAME, PackedFile, check_config, collect, write_package

CONFIG = """\
# rlhf-ray sft some.yaml
run: {dir: /shared/runs/a}
data: {path: data/demos.jsonl, max_tokens: 64}
model: {chat_template: default, scratch: {hidden_size: 64, num_heads: 2, num_kv_heads: 2, vocab_size: 300}}
sft: {}
"""
PPO = {
    "run": {"dir": "/shared/runs/p"},
    "data": {"path": "/shared/prompts.jsonl", "max_tokens": 32},
    "policy": {"path": "org/model"},
    "reward": {"models": [{"path": "/shared/reward"}], "functions": [{"path": "rewards.brevity:score"}]},
    "rollout": {"kv_cache_gib": 0.5, "max_new_tokens": 32},
    "ppo": {"iterations": 1, "prompts_per_iteration": 2},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with code, data and a configuration to stand in."""
    monkeypatch.chdir(tmp_path)
    write("some.yaml", CONFIG)
    write("data/demos.jsonl", "{}\n")
    write("rewards/brevity.py")
    return tmp_path


def write(name: str, text: str = "text\n") -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


def names(root: Path) -> list[str]:
    return [file.name for file in collect(root)]


@pytest.fixture
def submit(capsys, monkeypatch):
    """Calls `rlhf-ray submit`; returns exit code, standard output and standard error."""
    # The address that is given wins, and what the command sets is undone.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            # Nothing answers at the address; what is found before must not depend on it.
            main(["submit", *arguments, "--address", "http://127.0.0.1:9"])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


# What is uploaded


def test_ignore_files_count_for_their_folder_and_below(folder):
    write(".gitignore", "*.log\nbuild/\n/top.txt\n")
    write(".rayignore", "/docs\n!kept.log\n")
    for name in ("a.log", "rewards/b.log", "build/x", "top.txt", "rewards/top.txt", "docs/page", "rewards/docs/page"):
        write(name)
    write("rewards/.gitignore", "!b.log\n*.tmp\n")
    for name in ("rewards/c.tmp", "c.tmp", "kept.log"):
        write(name)
    assert names(folder) == [
        ".gitignore",
        ".rayignore",
        "c.tmp",
        "data/demos.jsonl",
        "rewards/.gitignore",
        "rewards/b.log",
        "rewards/brevity.py",
        "rewards/docs/page",
        "rewards/top.txt",
        "some.yaml",
    ]


def test_environments_and_git_are_never_uploaded(folder):
    for name in (".git/HEAD", ".venv/lib/torch.bin", "venv/x", "rewards/__pycache__/brevity.pyc", CONFIG_NAME):
        write(name)
    assert names(folder) == ["data/demos.jsonl", "rewards/brevity.py", "some.yaml"]


def test_the_archive_holds_the_files_and_the_configuration_and_is_the_same_each_time(folder, tmp_path_factory):
    files = collect(folder)
    archives = [tmp_path_factory.mktemp("out") / "package.zip" for _ in range(2)]
    write_package(folder, files, "run: {}\n", archives[0])
    os.utime("some.yaml", (1e9, 1e9))
    write_package(folder, files, "run: {}\n", archives[1])
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with zipfile.ZipFile(archives[0]) as archive:
        assert archive.namelist() == ["data/demos.jsonl", "rewards/brevity.py", "some.yaml", CONFIG_NAME]
        assert archive.read("some.yaml").decode() == CONFIG
        assert archive.read(CONFIG_NAME) == b"run: {}\n"


def test_files_keep_their_permissions(folder, tmp_path_factory):
    write("run.sh")
    Path("run.sh").chmod(0o755)
    target = tmp_path_factory.mktemp("out") / "package.zip"
    write_package(folder, collect(folder), "", target)
    with zipfile.ZipFile(target) as archive:
        assert archive.getinfo("run.sh").external_attr >> 16 & 0o777 == 0o755


# What is refused


def test_weights_runs_and_links_to_folders_are_named(folder, tmp_path_factory):
    write("model/model.safetensors", "x" * 2048)
    write("runs/a/run.json")
    write("runs/a/metrics.jsonl")
    Path("runs/a/checkpoints").mkdir()
    Path("everything").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(PackageError) as refused:
        collect(folder)
    text = str(refused.value)
    assert "everything (a link to a folder), model/model.safetensors (weights, 2.0 KiB), runs/a (a run)." in text
    assert "name these in .rayignore" in text
    write(".rayignore", "runs\nmodel/\n/everything\n")
    assert names(folder) == [".rayignore", "data/demos.jsonl", "rewards/brevity.py", "some.yaml"]


@pytest.mark.parametrize(("below", "what"), [(".", "is a run's directory"), ("logs", "lies in a run's directory, ")])
def test_a_job_is_not_submitted_from_inside_a_run(folder, submit, monkeypatch, below, what):
    write("runs/a/run.json")
    write("runs/a/logs/driver.log")
    Path("runs/a/checkpoints").mkdir()
    monkeypatch.chdir(Path("runs/a", below))
    code, out, err = submit(str(folder / "some.yaml"))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {Path.cwd()}: {what}")
    assert str(folder / "runs/a") in err
    assert err.rstrip().endswith("submit from the folder of your code")


def test_of_many_some_are_named_and_the_others_counted(folder):
    for index in range(8):
        write(f"{index}.pt")
    with pytest.raises(PackageError, match=r"0\.pt .*4\.pt \(weights, 0\.0 KiB\) and 3 more\."):
        collect(folder)


def test_what_is_too_large_is_refused_with_the_largest_files(folder, monkeypatch, tmp_path_factory):
    write("big.csv", "0" * 3000)
    write("small.csv", "0" * 1000)
    monkeypatch.setattr(package, "UPLOAD_LIMIT_BYTES", 2048)
    with pytest.raises(PackageError, match=r"The largest files: big\.csv \(2\.9 KiB\), small\.csv"):
        collect(folder)
    Path("big.csv").write_bytes(os.urandom(1500))
    Path("small.csv").unlink()
    files = collect(folder)
    monkeypatch.setattr(package, "UPLOAD_LIMIT_BYTES", 1500)
    with pytest.raises(PackageError, match="takes less than"):
        write_package(folder, files, "", tmp_path_factory.mktemp("out") / "package.zip")


def test_a_link_to_a_file_is_uploaded_as_the_file_and_a_broken_one_is_not(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "text"
    other.write_text("12345")
    Path("linked").symlink_to(other)
    Path("broken").symlink_to(other.with_name("none"))
    assert PackedFile("linked", 5) in collect(folder)
    assert "broken" not in names(folder)


# Configurations


def test_a_configuration_that_a_job_can_read_passes(folder):
    check_config(load_config("some.yaml", [], "sft"), collect(folder))
    check_config(load_config("some.yaml", ["data.path=data"], "sft"), collect(folder))
    check_config(load_config("some.yaml", ["data.path=./data/../data/demos.jsonl"], "sft"), collect(folder))
    check_config(load_config("some.yaml", ["data.path=[/shared/x.jsonl, org/dataset]"], "sft"), collect(folder))
    check_config(from_dict(PPO, "ppo"), collect(folder))


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["run.dir=runs/a"], "run.dir: found 'runs/a', but a job's working directory is a copy"),
        (["run.ray_address=auto"], "run.ray_address: found 'auto', but a job runs on the cluster that it is"),
        (["data.path=data/none.jsonl"], "data.path: found 'data/none.jsonl', which is not in the upload"),
        (["data.path=[data/demos.jsonl, ../x.jsonl]"], "data.path: found '../x.jsonl', which is not in the upload"),
        (["data.eval_path=ignored"], "data.eval_path: found 'ignored', which is not in the upload"),
        (["model.chat_template=./t.jinja"], "model.chat_template: found './t.jinja', which is not in the upload"),
    ],
)
def test_a_configuration_that_would_mean_something_else_in_a_job_is_refused(folder, overrides, found):
    write("ignored/x.jsonl")
    write(".gitignore", "ignored/\n")
    with pytest.raises(ConfigError) as refused:
        check_config(load_config("some.yaml", overrides, "sft"), collect(folder))
    assert str(refused.value).startswith(found)


def test_all_problems_are_named_at_once_and_with_their_keys(folder):
    values = PPO | {"run": {"dir": "here"}, "reward": {"models": [{"path": "/a"}, {"path": "./b"}]}}
    with pytest.raises(ConfigError, match=r"(?s)2 problems:\n  run\.dir: .*\n  reward\.models\.1\.path: found './b'"):
        check_config(from_dict(values, "ppo"), collect(folder))


# The command


def test_a_dry_run_prints_a_configuration_that_loads_and_what_would_be_sent(folder, submit, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "a-secret-value")
    code, out, err = submit("some.yaml", "sft.epochs=3", "--dry-run", "--name", "try-1", "--env", "SOME_KEY")
    assert (code, err) == (0, "")
    assert "a-secret-value" not in out
    Path("resolved.yaml").write_text(out)
    assert load_config("resolved.yaml", [], "sft") == load_config("some.yaml", ["sft.epochs=3"], "sft")
    assert "# job: try-1\n" in out
    assert f"# command: exec python -m rlhf_ray sft {CONFIG_NAME}\n" in out
    assert "# environment variables: SOME_KEY\n" in out
    assert "# upload: 3 files, " in out


@pytest.mark.parametrize(
    ("arguments", "code", "found"),
    [
        (["some.yaml", "sft.epoch=1"], 2, "sft.epoch: unknown key"),
        (["some.yaml", "run.dir=runs/a"], 2, "run.dir: found 'runs/a'"),
        (["none.yaml"], 2, "none.yaml: cannot be read"),
        (["plain.yaml"], 2, "plain.yaml: found no section of a stage, expected one of sft, "),
        (["some.yaml", "--env", "NOT_SET_ANYWHERE"], 2, "--env: NOT_SET_ANYWHERE not set in this environment"),
        (["some.yaml", "--env", "A-B"], 2, "--env: found 'A-B', expected the name"),
        (["some.yaml", "--name", "a/b"], 2, "--name: found 'a/b', expected up to 100"),
        (["some.yaml"], 1, "no Ray dashboard answers at http://127.0.0.1:9"),
    ],
)
def test_what_is_wrong_is_one_error(folder, submit, arguments, code, found):
    write("plain.yaml", "run: {dir: runs/a}\n")
    found_code, out, err = submit(*arguments)
    assert (found_code, out) == (code, "")
    assert err.startswith("error: ")
    assert found in err


def test_the_command_shows_in_the_configurations_sections(folder, submit):
    write("plain.yaml", CONFIG.partition("\n")[2])
    code, out, _ = submit("plain.yaml", "--dry-run")
    assert code == 0
    assert "# command: exec python -m rlhf_ray sft " in out
    assert "# job: sft-a-" in out


def test_a_value_on_the_command_line_is_not_repeated(folder, submit):
    code, out, err = submit("some.yaml", "--env", "SOME_KEY=a-secret-value")
    assert (code, out) == (2, "")
    assert "--env: found SOME_KEY=..., expected a name alone" in err
    assert "a-secret-value" not in err


@pytest.mark.parametrize("command", [["jobs"], ["logs", "some"], ["stop", "some"]])
@pytest.mark.parametrize(
    ("address", "found"),
    [("http://127.0.0.1:9", "no Ray dashboard answers at"), ("auto", "expected the dashboard's URL")],
)
def test_an_address_without_a_dashboard_is_one_error(capsys, monkeypatch, command, address, found):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(SystemExit) as ended:
        main([*command, "--address", address])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (1, "")
    assert captured.err.startswith("error: --address: ")
    assert found in captured.err


def test_weights_are_refused_before_anything_is_called(folder, submit):
    write("model.pt")
    code, out, err = submit("some.yaml")
    assert (code, out) == (2, "")
    assert "model.pt (weights" in err


@given(st.lists(st.sampled_from(["..", ".", "data", "demos.jsonl", "~", "rewards", "outside.jsonl"]), min_size=1))
def test_paths_of_a_job_lead_nowhere_outside_of_its_folder(parts):
    """Whatever a relative path goes through, it ends at a file or folder of the upload."""
    files = [PackedFile("data/demos.jsonl", 3), PackedFile("rewards/brevity.py", 5)]
    name = "./" + "/".join(parts)
    config = from_dict(PPO | {"data": {"path": name, "max_tokens": 32}}, "ppo")
    inside = os.path.normpath(name) in ("data", "data/demos.jsonl", "rewards", "rewards/brevity.py")
    try:
        check_config(config, files)
    except ConfigError as error:
        assert not inside and str(error).startswith(f"data.path: found {name!r}, which is not in the upload")
    else:
        assert inside
