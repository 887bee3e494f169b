"""The tests here use the tiny models of the unit tests and the inputs of the system tests."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("unit", "system")]
