"""`rollout.vllm`: what the installed vLLM knows, and what a run leaves to nobody else."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig, dump_config, from_dict, load_config
from rlhf_ray.driver.groups import engine_spec
from rlhf_ray.errors import ConfigError
from rlhf_ray.rollout.engine import engine_args
from rlhf_ray.rollout.options import KEYS, OURS, OURS_ON_CPU, check_options, known_options


def config(options: Any, *overrides: str) -> PPOConfig:
    values = {
        "run": {"dir": "run"},
        "data": {"path": "prompts.jsonl"},
        "policy": {"path": "policy"},
        "critic": {"init": "policy"},
        "reward": {"functions": [{"path": "a:b"}]},
        "rollout": {"kv_cache_gib": 1.0, "vllm": options},
        "ppo": {"iterations": 1, "prompts_per_iteration": 1},
    }
    found = from_dict(values, "ppo", list(overrides), "test")
    assert isinstance(found, PPOConfig)
    return found


def test_names_are_those_of_the_installed_version():
    assert {"enforce_eager", "swap_space_gib_of_nobody"} & known_options() == {"enforce_eager"}
    # What the run sets itself are options of this version, too: a new one that drops some is seen here.
    assert {*KEYS, *OURS, *OURS_ON_CPU} <= known_options()


def test_all_that_a_run_sets_is_refused():
    given = set(engine_args(engine_spec(config({}), ())))
    assert given <= {*KEYS, *OURS, *OURS_ON_CPU, "enable_prefix_caching"}
    for name in given - {"enable_prefix_caching"}:
        with pytest.raises(ConfigError, match=rf"rollout\.vllm\.{name}: (follows from|is set by the run itself)"):
            check_options({name: 1}, gpu=False)


def test_options_reach_vllm():
    check_options({"enforce_eager": True, "enable_prefix_caching": False}, gpu=False)
    args = engine_args(engine_spec(config({}, "rollout.vllm.enable_prefix_caching=false"), ()))
    assert args["enable_prefix_caching"] is False
    check_options({"max_num_batched_tokens": 8192}, gpu=True)


def test_each_wrong_option_is_named():
    with pytest.raises(ConfigError) as raised:
        check_options({"enforce_eagr": True, "dtype": "half", "load_format": "auto"}, gpu=False)
    assert str(raised.value).splitlines() == [
        "rollout.vllm.enforce_eagr: the installed vLLM has no such option; did you mean enforce_eager?",
        "rollout.vllm.dtype: follows from rollout.dtype; set that",
        "rollout.vllm.load_format: is set by the run itself; leave it out",
    ]
    with pytest.raises(ConfigError, match="max_num_batched_tokens: is set by the run itself on a CPU"):
        check_options({"max_num_batched_tokens": 8192}, gpu=False)


def test_options_may_be_nested_and_are_written_as_they_were_read(tmp_path: Path):
    options = {"compilation_config": {"cudagraph_mode": "FULL", "sizes": [1, 2.5, None]}, "enforce_eager": False}
    path = tmp_path / "ppo.yaml"
    path.write_text(dump_config(config(options)))
    loaded = load_config(path, [], "ppo")
    assert isinstance(loaded, PPOConfig)
    assert loaded.rollout.vllm == options


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize("value", [object(), {1: 2}, [2**63], float("inf"), (1, 2), ENDLESS])
def test_what_yaml_cannot_hold_is_refused(value: Any):
    with pytest.raises(ConfigError, match=r"rollout\.vllm: holds what is no text, number"):
        config({"option": value})
