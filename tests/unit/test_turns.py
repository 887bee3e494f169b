"""Groups that share GPUs; what they do is tested with real engines."""

from pathlib import Path
from typing import Any, cast

import pytest

from rlhf_ray.config import PPOConfig, from_dict
from rlhf_ray.driver.turns import Turns
from rlhf_ray.tracking.logs import setup_logging


def config(share: list[list[str]]) -> PPOConfig:
    return from_dict(
        {
            "run": {"dir": "unused"},
            "data": {"path": "unused.jsonl"},
            "policy": {"path": "unused"},
            "critic": {"init": "policy"},
            "reward": {"functions": [{"path": "module:function"}]},
            "rollout": {"kv_cache_gib": 0.1},
            "ppo": {"iterations": 1, "prompts_per_iteration": 2, "kl_coef": 0.0},
            "placement": {"share": share},
        },
        "ppo",
    )


@pytest.mark.parametrize(("share", "said"), [([["policy", "rollout"]], True), ([], False)])
def test_that_engines_do_not_sleep_on_a_cpu_is_said_on_the_console(
    share: list[list[str]], said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    setup_logging(tmp_path, "driver")
    turns = Turns(config(share), {}, cast("Any", None))
    assert not turns.taken
    told = "rollout shares its place with policy; on a CPU engines do not sleep"
    assert (told in capsys.readouterr().err) == said
