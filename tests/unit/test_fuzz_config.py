"""Damaged and hostile configurations and overrides: a configuration, or one message about what is wrong with it.

A configuration that is accepted can be written down and loads back to the same.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from config_values import VALUES
from fuzzing import amounts, fuzz, hostile, outcome, put
from hypothesis import strategies as st

from rlhf_ray.config import dump_config, from_dict, load_config
from rlhf_ray.config.keys import fields, leaves
from rlhf_ray.config.load import CONFIGS, STAGE_SECTIONS, Kind, load_any
from rlhf_ray.config.yaml_rules import dump_yaml, parse_yaml
from rlhf_ray.placement.inventory import load_inventory

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = b"nodes:\n- {name: gpu, count: 2, cpus: 16, gpus: 8, gpu_memory_gib: 80}\n- {name: cpu, cpus: 4}\n"
# What tells the kind of a configuration.
SECTIONS = {kind: {section: {}} for kind, section in STAGE_SECTIONS.items()} | {"pipeline": {}}
SAMPLES = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
SAMPLES += [dump_yaml(SECTIONS[kind] | values).encode() for kind, values in VALUES.items()]
SAMPLES += [json.dumps(SECTIONS[kind] | values).encode() for kind, values in VALUES.items()]
KINDS: list[Kind] = list(VALUES)
KEYS = sorted({key for kind in CONFIGS for key, _ in fields(CONFIGS[kind])})
TEXTS = ["", "~", "null", "true", "0", "1", "-1", "0.5", "1e308", "1e-320", "1e999", ".nan", ".inf", "0x10", "9" * 30]
TEXTS += ["9" * 5000, "[]", "{}", "[1]", "[[a, b]]", "{a: b}", "[a, [b, {c: d}]]", "text", "'0'", '"\\0"', '"\\uD800"']
TEXTS += [
    '"\\U00110000"',
    "&a [*a]",
    "[" * 500,
    "!!timestamp 9",
    "a: b: c",
    "off",
    "2001-01-01",
    "x" * 5000,
    "[policy]",
]
TEXTS += ["[[policy, rollout]]", "{policy: {a: b}}", "\t", "a\n  b", "- a", "ppo", "[ppo, sft]", "[ppo, ppo]", "\u00b2"]


def values_of_any_kind() -> st.SearchStrategy[tuple[Kind, dict[str, Any], list[str]]]:
    """A kind, valid values of it, and overrides of keys that it has, or nearly has, by anything."""
    index = st.sampled_from(["", "0", "1", "7", "-1", "\u00b2", "\u0663", "9" * 20, "9" * 5000, "x", "models", "*"])
    part = st.sampled_from(sorted({part for key in KEYS for part in key.split(".")})) | index | st.text(max_size=3)
    key = st.sampled_from(KEYS) | st.lists(part, max_size=4).map(".".join) | st.just("a." * 2000 + "a")
    key |= st.tuples(st.sampled_from(KEYS), index).map(".".join)
    number = st.integers() | st.integers(-(2**70), 2**70) | st.floats()
    text = st.sampled_from(TEXTS) | number.map(str) | st.text(max_size=6)
    usual = st.tuples(st.sampled_from(KEYS), st.sampled_from(["1", "2", "0.5", "1.0", "true", "text", "[]", "64"]))
    override = usual.map("=".join) | st.tuples(key, text).map("=".join) | st.text(max_size=12)
    kinds = st.sampled_from(KINDS)
    return kinds.flatmap(lambda kind: st.tuples(st.just(kind), st.just(VALUES[kind]), st.lists(override, max_size=3)))


def python_values() -> st.SearchStrategy[tuple[Kind, dict[str, Any], list[str]]]:
    """A kind and what a Python program may hand over: any value at any of its keys."""
    scalar = (
        st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**400) | st.floats() | st.text(max_size=5)
    )
    value = st.recursive(
        scalar | st.sampled_from(["policy", "rollout", "sft", "ppo", "\ud800", "a\0b"]) | st.binary(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    )

    def changed(kind: Kind, changes: list[tuple[int, Any]]) -> tuple[Kind, dict[str, Any], list[str]]:
        values, keys = json.loads(json.dumps(VALUES[kind])), leaves(CONFIGS[kind])
        for number, one in changes:
            *above, name = keys[number % len(keys)].replace("*", "0").split(".")
            node = values
            for part in above:
                node = node.setdefault(part, {}) if isinstance(node, dict) else {}
            if isinstance(node, dict):
                node[name] = one
        return kind, values, []

    value = st.integers(0, 3) | st.floats(0, 1) | st.just("a") | value
    changes = st.lists(st.tuples(st.integers(0, 500), value), min_size=1, max_size=2)
    return st.builds(changed, st.sampled_from(KINDS), changes)


def check_loads_back(config: Any, kind: Kind) -> None:
    assert from_dict(parse_yaml(dump_config(config)), kind) == config


def check_file(path: Path) -> str:
    def load() -> None:
        config = load_any(path, [])
        check_loads_back(config, next(kind for kind in KINDS if type(config) is CONFIGS[kind]))

    outcome(lambda: load_config(path, [], "ppo"), str(path))
    return outcome(load, str(path))


@pytest.mark.parametrize("number", amounts(short=200, long=12_000))
def test_a_damaged_configuration_loads_or_is_refused(number, tmp_path):
    path = tmp_path / "a.yaml"
    fuzz("configuration", hostile(SAMPLES), number, lambda content: check_file(put(path, content)))


@pytest.mark.parametrize("number", amounts(short=100, long=4_000))
def test_a_damaged_inventory_loads_or_is_refused(number, tmp_path):
    path = tmp_path / "nodes.yaml"
    inputs = hostile([INVENTORY, INVENTORY.splitlines(keepends=True)[0] + b"- {name: a, cpus: 1}\n"])
    fuzz("inventory", inputs, number, lambda one: outcome(lambda: load_inventory(put(path, one)), str(path)))


@pytest.mark.parametrize("inputs", [values_of_any_kind, python_values], ids=["overrides", "values"])
@pytest.mark.parametrize("number", amounts(short=200, long=12_000))
def test_keys_that_hold_anything_load_or_are_refused(inputs, number):
    def check(one: tuple[Kind, dict[str, Any], list[str]]) -> str:
        kind, values, overrides = one
        return outcome(lambda: check_loads_back(from_dict(values, kind, overrides), kind), "")

    fuzz(inputs.__name__, inputs(), number, check)
