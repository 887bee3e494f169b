"""The command line, in this process except where start-up itself is looked at."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_llama

from rlhf_ray import __version__
from rlhf_ray.cli import main
from rlhf_ray.config import load_config
from rlhf_ray.errors import RunStopped
from rlhf_ray.stages.pipeline import STAGES

ROOT = Path(__file__).resolve().parents[2]
HUB_CONFIGS = ["one_gpu", "one_node", "multi_node"]
LOCAL_CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem not in HUB_CONFIGS]

SFT = """\
run: {dir: runs/a}
data: {path: demos.jsonl, max_tokens: 64}
model:
  chat_template: default
  scratch: {hidden_size: 64, num_heads: 2, num_kv_heads: 2, vocab_size: 300, max_length: 64}
"""
PPO = """\
run: {dir: runs/p}
data: {path: prompts.jsonl, max_tokens: 32}
policy: {path: models/policy/it}
reward: {models: [{path: models/reward/it}]}
rollout: {kv_cache_gib: 0.5, max_new_tokens: 32}
ppo: {iterations: 1, prompts_per_iteration: 2}
"""
DEMOS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}] * 3
PROMPTS = [{"prompt": [{"role": "user", "content": "the quick brown fox"}]}] * 5


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with data and configurations to stand in."""
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text(SFT)
    Path("ppo.yaml").write_text(PPO)
    Path("demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMOS))
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return tmp_path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and a reward model that go together, and one of another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    make_llama(folder / "policy" / "it")
    make_llama(folder / "reward" / "it", scalar=True)
    make_llama(folder / "other" / "it", scalar=True, vocab=300)
    return folder


@pytest.fixture
def run(capsys):
    """Calls the command line; returns exit code, standard output and standard error."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Around the commands


def test_the_version_is_printed(run):
    assert run("--version") == (0, f"rlhf-ray {__version__}\n", "")


def test_help_names_every_command_and_loads_nothing_heavy():
    script = (
        "import sys\nfrom rlhf_ray.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'vllm', 'transformers', 'pydantic'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout.endswith("[]\n"), result.stdout
    stages = ("sft", "reward", "ppo", "dpo", "pipeline", "generate", "demo")
    for command in (*stages, "plan", "doctor", "scale", "submit", "jobs", "logs", "stop"):
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE), command


@pytest.mark.parametrize("arguments", [["sft"], ["sft", "a.yaml", "--dryrun"], ["train", "a.yaml"]])
def test_a_command_line_that_is_wrong_exits_with_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: rlhf-ray" in err


def test_an_error_is_printed_alone_with_its_exit_code(run, workspace, monkeypatch):
    def stopped(config):
        raise RunStopped("sft: stopped by a signal after step 3 of 9")

    monkeypatch.setitem(STAGES, "sft", stopped)
    code, out, err = run("sft", "sft.yaml")
    assert (code, out, err) == (143, "", "error: sft: stopped by a signal after step 3 of 9\n")


def test_a_defect_keeps_its_traceback(workspace, monkeypatch):
    def broken(config):
        raise ZeroDivisionError("a defect")

    monkeypatch.setitem(STAGES, "sft", broken)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main(["sft", "sft.yaml"])


def test_ctrl_c_exits_with_130(run, workspace, monkeypatch):
    monkeypatch.setitem(STAGES, "sft", lambda config: signal.raise_signal(signal.SIGINT))
    code, out, _ = run("sft", "sft.yaml")
    assert (code, out) == (130, "")


def test_the_model_folder_is_printed_at_the_end(run, workspace, monkeypatch):
    monkeypatch.setitem(STAGES, "sft", lambda config: Path(config.run.dir, "model"))
    assert run("sft", "sft.yaml", "run.dir=runs/b") == (0, "runs/b/model\n", "")


# What is wrong before anything starts


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["sft", "sft.yaml", "data.max_tokns=3"], "data.max_tokns: unknown key; did you mean data.max_tokens?"),
        (["sft", "sft.yaml", "training.zero_stage=four"], 'training.zero_stage: found "four", expected a whole'),
        (["sft", "none.yaml"], "none.yaml: cannot be read"),
        (["sft", "sft.yaml", "data.path=demo.jsonl"], "demo.jsonl does not exist; did you mean demos.jsonl?"),
        (["sft", "sft.yaml", "data.max_tokens=65"], "more than the 64 of `model.scratch.max_length`"),
        (["ppo", "ppo.yaml"], "The model folder models/policy/it does not exist"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_bad_input_is_one_error_and_leaves_nothing(run, workspace, arguments, found, dry):
    before = tree(workspace)
    code, out, err = run(*arguments, *(["--dry-run"] if dry else []))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert found in err
    assert "Traceback" not in err
    if dry:
        assert tree(workspace) == before


def test_a_malformed_row_is_named_with_its_line(run, workspace):
    with Path("demos.jsonl").open("a") as file:
        file.write('{"question": "what"}\n')
    code, out, err = run("sft", "sft.yaml", "--dry-run")
    assert (code, out) == (2, "")
    assert "demos.jsonl:4" in err
    code, out, _ = run("sft", "sft.yaml", "data.malformed=skip", "--dry-run")
    assert code == 0
    assert "#   training: demos.jsonl (" in out
    assert "4 rows: 3 used, 1 skipped as malformed" in out


# Dry runs


def test_a_dry_run_prints_a_configuration_that_loads_and_writes_nothing(run, workspace):
    before = tree(workspace)
    code, out, err = run("sft", "sft.yaml", "sft.learning_rate=3e-3", "--dry-run")
    assert (code, err) == (0, "")
    assert tree(workspace) == before
    Path("resolved.yaml").write_text(out)
    assert load_config("resolved.yaml", [], "sft") == load_config("sft.yaml", ["sft.learning_rate=3e-3"], "sft")
    assert "# run directory runs/a: new\n" in out
    assert re.search(r"^#   group +1 +1 +0 +1 +0$", out, re.MULTILINE), out
    assert "3 rows: 3 used, 0 skipped as malformed" in out


def test_the_parameters_of_a_new_model_are_those_that_transformers_counts(run, workspace):
    from transformers import LlamaConfig, LlamaForCausalLM

    _, out, _ = run("sft", "sft.yaml", "model.scratch.num_kv_heads=1", "--dry-run")
    shape = load_config("sft.yaml", ["model.scratch.num_kv_heads=1"], "sft").model.scratch
    assert shape is not None
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            intermediate_size=shape.intermediate_size,
            tie_word_embeddings=True,
        )
    )
    assert f"about {sum(p.numel() for p in model.parameters()):,} parameters" in out


def test_a_dry_run_of_ppo_describes_models_and_tokenises_prompts(run, workspace, models):
    Path("models").symlink_to(models)
    code, out, err = run("ppo", "ppo.yaml", "--dry-run")
    assert (code, err) == (0, "")
    assert "policy, reference and rollout: models/policy/it, LlamaForCausalLM with " in out
    assert "critic: models/reward/it, LlamaForSequenceClassification with " in out
    assert "context 256, vocabulary 320" in out
    assert re.search(r"5 rows: 5 used \(\d+ tokens, longest \d+\)", out)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["reward.models=[{path: models/other/it}]"], "do not share a vocabulary"),
        (["rollout.max_new_tokens=225"], "the context of models/policy/it is 256; lower it"),
        (["policy.path=models/reward/it"], "which scores text and writes none"),
        (["policy.path=models"], "The folder models holds no config.json"),
        (["reward.functions=[{path: 'nowhere:f'}]"], "'nowhere:f' cannot be imported"),
    ],
)
def test_a_dry_run_refuses_models_that_do_not_fit(run, workspace, models, overrides, found):
    Path("models").symlink_to(models)
    code, out, err = run("ppo", "ppo.yaml", *overrides, "--dry-run")
    assert code != 0
    assert out == ""
    assert err.startswith("error: ")
    assert found in err


def test_a_dry_run_refuses_a_model_folder_without_weights(run, workspace, models):
    shutil.copytree(models, "models")
    Path("models/policy/it/model.safetensors").unlink()
    code, _, err = run("ppo", "ppo.yaml", "--dry-run")
    assert (code, "holds no weights" in err) == (2, True)


def test_a_dry_run_says_what_a_run_directory_holds(run, workspace):
    folder = Path("runs/a")
    (folder / "checkpoints" / "step_000004").mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert "unfinished run, which continues from step_000004" in run("sft", "sft.yaml", "--dry-run")[1]
    code, out, err = run("sft", "sft.yaml", "run.resume=never", "--dry-run")
    assert (code, out) == (1, "")
    assert "already holds a run" in err
    (folder / "model").mkdir()
    (folder / "model" / "COMPLETE").touch()
    (folder / "summary.json").touch()
    assert "runs/a: finished already" in run("sft", "sft.yaml", "--dry-run")[1]


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_shipped_configurations_of_public_models_dry_run_without_network(run, workspace, name):
    code, out, err = run("ppo", str(ROOT / "configs" / f"{name}.yaml"), "--dry-run")
    assert (code, err) == (0, "")
    assert out.count("on the hub, fetched at the start; not looked up") == 4
    assert "too little on this machine alone: " in out


@pytest.mark.parametrize("path", LOCAL_CONFIGS, ids=lambda path: path.stem)
def test_every_other_shipped_configuration_names_what_is_not_there(run, workspace, path):
    kind = path.read_text().split()[2]
    code, out, err = run(kind, str(path), "--dry-run")
    assert (code, out) == (2, "")
    assert "does not exist" in err


# Generation


def test_generate_refuses_what_it_cannot_answer(run, workspace, models):
    policy = str(models / "policy" / "it")
    for arguments, found in [
        ([policy], "give --prompt TEXT or --prompts-file FILE"),
        ([policy, "--prompt", "a", "--temperature", "-1"], "temperature: found -1"),
        ([policy, "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens: found 0"),
        ([policy, "--prompts-file", "none.txt"], "none.txt: cannot read the prompts"),
        ([policy, "--prompt", "0123456789 " * 200], "leaves no room for a reply"),
        ([str(models / "reward" / "it"), "--prompt", "a"], "which scores text and writes none"),
        (["runs/none/model", "--prompt", "a"], "The model folder runs/none/model does not exist"),
        ([str(workspace), "--prompt", "a"], "holds neither a model"),
    ]:
        code, out, err = run("generate", *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: ")
        assert found in err


def test_generate_dry_run_resolves_a_run_directory(run, workspace, models):
    shutil.copytree(models / "policy" / "it", "runs/p/ppo/model")
    code, out, _ = run("generate", "runs/p/ppo", "--prompts-file", "prompts.jsonl", "--dry-run")
    assert code == 0
    assert "model: runs/p/ppo/model\n" in out
    assert "prompts: 5\n" in out
    code, _, err = run("generate", "runs/p", "--prompt", "a", "--dry-run")
    assert (code, "name one of them: runs/p/ppo" in err) == (2, True)


@pytest.mark.system
def test_generate_prints_replies_alone_and_the_same_ones_again(workspace, models):
    policy = str(models / "policy" / "it")

    def ask(*arguments):
        command = [sys.executable, "-m", "rlhf_ray", "generate", policy, "--max-new-tokens", "6", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=workspace)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    sampled = ask("--prompt", "the quick", "--prompt", "the quick", "--seed", "3", "--json")
    assert [reply["prompt"] for reply in sampled] == ["the quick", "the quick"]
    assert sampled[0]["text"] != sampled[1]["text"]
    assert all(1 <= reply["tokens"] <= 6 for reply in sampled)
    assert ask("--prompt", "the quick", "--prompt", "the quick", "--seed", "3", "--json") == sampled
