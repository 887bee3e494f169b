"""A run that starts with the engines there is room for, and takes the others in as nodes arrive."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.long]

SCRIPT = Path(__file__).with_name("growing_run.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `growing_run.py` saw."""
    folder = tmp_path_factory.mktemp("growing")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "found.json").read_text())


def test_the_run_works_with_one_engine_and_takes_in_the_second_with_its_node(found: dict[str, Any]):
    assert [row["rollout/engines"] for row in found["rows"]] == [1, 1, 2, 2]
    assert [row["rollout/weight_version"] for row in found["rows"]] == [0, 1, 2, 3]


def test_the_missing_engine_is_asked_for_as_long_as_no_node_holds_it(found: dict[str, Any]):
    assert found["asked"][:2] == [["CREATED", "PENDING"]] * 2


def test_nothing_stays_reserved(found: dict[str, Any]):
    assert found["left"] == []
