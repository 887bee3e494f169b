"""PPO of configurations that cannot run: one error each, and nothing is left."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ppo_runs import Inputs, make_inputs, nothing_left
from tiny_models import make_llama, make_tokenizer

from rlhf_ray.errors import ConfigError, DataError, ModelError, ResourceError, RlhfError
from rlhf_ray.stages.ppo import train_ppo

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("bad_input"))


@dataclass(frozen=True)
class Bad:
    """A configuration that cannot run: what to change in the common one, and the error it must be."""

    error: type[RlhfError]
    message: str
    sections: Callable[[Inputs], dict[str, dict[str, Any]]]


BAD = {
    "missing reward model": Bad(
        ModelError,
        r"/nowhere/reward",
        lambda i: {"reward": {"models": [{"path": "/nowhere/reward"}]}, "critic": {"init": "policy"}},
    ),
    "missing reward model that is the critic too": Bad(
        ModelError, r"/nowhere/reward.*does not exist", lambda i: {"reward": {"models": [{"path": "/nowhere/reward"}]}}
    ),
    "another vocabulary": Bad(
        ModelError,
        r"(?s)other_words.*same tokenizer",
        lambda i: {"critic": {"init": other_vocabulary(i)}},
    ),
    "a short context": Bad(
        ConfigError,
        r"data.max_tokens \+ rollout.max_new_tokens: sequences of up to 300 tokens, .* is 256; lower it",
        lambda i: {"data": {"max_tokens": 288}},
    ),
    "too few prompts": Bad(
        DataError,
        r"`ppo.spare_prompts` is 20, and there are 20 prompts",
        lambda i: {
            "reward": {"functions": [{"path": "reward_functions:scarce", "min_scored": 0.5}]},
            "ppo": {"iterations": 1, "prompts_per_iteration": 8, "spare_prompts": 20},
        },
    ),
    "too few CPUs": Bad(
        ResourceError,
        r"CPU: the run needs 21\.5 \(.*\) and the cluster has 8; lower",
        lambda i: {"policy": {"cpus": 20.0}},
    ),
    "too few GPUs": Bad(
        ResourceError,
        r"GPU: the run needs 1 \(policy 1 x 1\) and the cluster has 0",
        lambda i: {"policy": {"gpus": 1.0}},
    ),
}


def other_vocabulary(inputs: Inputs) -> str:
    folder = inputs.folder / "other_words"
    make_llama(folder, scalar=True)
    make_tokenizer(texts=["an altogether different corpus", "makes other merges"]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_and_nothing_is_left(ray_cluster: None, inputs: Inputs, name: str):
    bad = BAD[name]
    config = inputs.config(name.replace(" ", "_"), **bad.sections(inputs))
    with nothing_left(), pytest.raises(bad.error, match=bad.message) as raised:
        train_ppo(config)
    assert "Traceback" not in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3
    folder = Path(config.run.dir)
    assert not (folder / "model").exists()
    assert not (folder / "summary.json").exists()
    assert not any((folder / "checkpoints").glob("*"))
    assert not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text()


def test_a_run_that_never_started_leaves_its_directory_to_the_mended_configuration(inputs: Inputs):
    missing = inputs.config("mended", reward={"models": [{"path": "/nowhere/reward"}]})
    with pytest.raises(ModelError):
        train_ppo(missing)
    # Mended, but for a second mistake that is found before any process starts.
    with pytest.raises(ConfigError, match="context"):
        train_ppo(inputs.config("mended", data={"max_tokens": 288}))
