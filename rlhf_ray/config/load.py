"""Reading a configuration from YAML and overrides, and saying in one message all that is wrong with it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import yaml
from pydantic import BaseModel, ValidationError

from rlhf_ray.config.keys import suggest
from rlhf_ray.config.offline import DPOConfig, RewardConfig, SFTConfig
from rlhf_ray.config.pipeline import STAGE_CONFIGS, PipelineConfig, StageConfig
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.problems import Contradiction, prefixed
from rlhf_ray.config.yaml_rules import MOST_CHARACTERS, MOST_LEVELS, dump_yaml, parse_yaml
from rlhf_ray.errors import ConfigError, shortened

Model = TypeVar("Model", bound=BaseModel)
Kind = Literal["sft", "reward", "dpo", "ppo", "pipeline"]

# The section that a stage alone has.
STAGE_SECTIONS: dict[Kind, str] = {"sft": "sft", "reward": "reward_model", "dpo": "dpo", "ppo": "ppo"}

CONFIGS: dict[str, type[BaseModel]] = {**STAGE_CONFIGS, "pipeline": PipelineConfig}

# Problems that one message tells, and characters of each key and number in it.
MOST_PROBLEMS = 30
LONGEST_KEY = 100

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section (a mapping of keys)",
    "finite_number": "a finite number",
}


@overload
def load_config(path: str | Path, overrides: Sequence[str], kind: Literal["sft"]) -> SFTConfig: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], kind: Literal["reward"]) -> RewardConfig: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], kind: Literal["dpo"]) -> DPOConfig: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], kind: Literal["ppo"]) -> PPOConfig: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], kind: Literal["pipeline"]) -> PipelineConfig: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], kind: Kind) -> StageConfig | PipelineConfig: ...


def load_config(path, overrides, kind):
    """Reads a configuration file.

    Args:
        path: a YAML file.
        overrides: `section.key=value` each, the value in YAML; a list's items go by index, as in
            `reward.models.0.weight=2`, and the index after the last appends.
        kind: what the file configures.

    Raises:
        ConfigError: the file cannot be read, or the configuration is wrong; the message names every problem.
    """
    values = read_mapping(path, "sections such as `run:` with keys below")
    return from_dict(values, kind, overrides, source=str(path))


def load_any(path: str | Path, overrides: Sequence[str]) -> StageConfig | PipelineConfig:
    """Reads a configuration file whose kind shows in its sections; otherwise as `load_config`.

    Raises:
        ConfigError: as `load_config`, or it has the section of no stage or of several.
    """
    values = read_mapping(path, "sections such as `run:` with keys below")
    return from_dict(values, kind_of(values, str(path)), overrides, source=str(path))


def kind_of(values: dict[str, Any], source: str) -> Kind:
    """What a configuration configures, by the one section that only this kind has.

    Raises:
        ConfigError: no such section, or several.
    """
    if "stages" in values:
        return "pipeline"
    found = [kind for kind, section in STAGE_SECTIONS.items() if section in values]
    if len(found) != 1:
        sections = " and ".join(STAGE_SECTIONS[kind] for kind in found)
        raise ConfigError(
            f"{source}: found {sections or 'no section of a stage'}, expected one of "
            f"{', '.join(STAGE_SECTIONS.values())} (an empty one will do, as in `sft: {{}}`), or `stages` for "
            "a pipeline"
        )
    return found[0]


def read_mapping(path: str | Path, expected: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: the file.
        expected: what it should hold, in words, for the message where it is no mapping.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            # No more than is parsed: a device or a file of data has no end, or one far away.
            text = file.read(MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{path}: holds more than {MOST_CHARACTERS} characters, expected {expected} and no data")
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_where(error)}: not valid YAML: {_what(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found {_found(values)}, expected {expected}")
    return values


def from_dict(values: dict[str, Any], kind: Kind, overrides: Sequence[str] = (), source: str = "configuration") -> Any:
    """Builds a configuration from plain values; see `load_config`.

    Args:
        values: sections and their values; left as they are.
        kind: what they configure.
        overrides: as for `load_config`.
        source: where the values come from, for messages.
    """
    values = dict(values)
    for override in overrides:
        _apply(values, override)
    return validated(CONFIGS[kind], values, source)


def changed(config: Model, overrides: Sequence[str]) -> Model:
    """The same configuration with changes, written as overrides.

    Raises:
        ConfigError: the result is wrong.
    """
    values = config.model_dump(mode="json")
    for override in overrides:
        _apply(values, override)
    return validated(type(config), values, "configuration")


def validated(model: type[Model], values: dict[str, Any], source: str) -> Model:
    """The values as an instance of `model`.

    Raises:
        ConfigError: they are wrong; the message names every problem.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems, more = explain(error, values, model)
    except OverflowError as error:
        raise ConfigError(f"{source}: holds a number too large to reckon with ({error}); make it smaller") from error
    if len(problems) == 1:
        raise ConfigError(f"{source}: {problems[0]}")
    lines = [*problems, f"and {more} more"] if more else problems
    raise ConfigError(f"{source}: {len(problems) + more} problems:\n" + "\n".join(f"  {line}" for line in lines))


def dump_config(config: BaseModel) -> str:
    """A configuration as YAML, defaults included, that loads back to the same configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def _apply(values: dict[str, Any], override: str) -> None:
    """Sets one override in `values`, copying each container on the way, as aliases and callers share them."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    override = shortened(override)
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: expected section.key=value")
    if len(parts) > MOST_LEVELS:
        raise ConfigError(f"override {override!r}: found {len(parts)} parts in its key, expected {MOST_LEVELS} at most")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {_what(error)}") from error
    node: Any = values
    try:
        for depth, part in enumerate(parts[:-1]):
            index, child = _child(node, part, parts[:depth])
            if child is None:
                child = [] if _is_index(parts[depth + 1]) else {}
            node[index] = child.copy() if isinstance(child, dict | list) else child
            node = node[index]
        index, _ = _child(node, parts[-1], parts[:-1])
    except LookupError as error:
        raise ConfigError(f"override {override!r}: {error.args[0]}") from error
    node[index] = value


def _child(node: Any, part: str, above: list[str]) -> tuple[Any, Any]:
    """The index of `part` in a mapping or list, and what is there; a list grows by one for its next index."""
    here = shortened(".".join(above))
    if isinstance(node, dict):
        return part, node.get(part)
    if not isinstance(node, list):
        raise LookupError(f"{here} is {_found(node)}, so it has no {shortened(part)}")
    if not _is_index(part) or int(part) > len(node):
        raise LookupError(
            f"{here} is a list of {len(node)}, so it has no {shortened(part)}; the next index is {len(node)}"
        )
    if int(part) == len(node):
        node.append(None)
    return int(part), node[int(part)]


def _is_index(part: str) -> bool:
    """Whether a part of a key counts in a list; other digits than these are text, and longer numbers no index."""
    return re.fullmatch("[0-9]{1,9}", part) is not None


def explain(error: ValidationError, values: Any, model: type[BaseModel]) -> tuple[list[str], int]:
    """One line for each of the first problems, and how many more there are.

    A line has the dotted key, what was found, and what is expected or what to change.
    """
    lines: dict[str, list[str]] = {}
    expected: dict[str, tuple[str, list[str]]] = {}
    items = error.errors(include_url=False, include_input=False)
    for item in items[:MOST_PROBLEMS]:
        location, found = _locate(item["loc"], values, item["type"])
        whole_key = ".".join(map(str, location))
        key = shortened(whole_key, LONGEST_KEY)
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Contradiction):
            for problem in cause.problems:
                name, text = prefixed(problem, location)
                lines.setdefault(name, []).append(text)
        elif item["type"] == "extra_forbidden":
            lines.setdefault(key, []).append(f"unknown key; {suggest(whole_key, model)}")
        elif item["type"] == "missing":
            lines.setdefault(key, []).append("missing; set it")
        else:
            # A field that takes one of several types has one error for each of them.
            expected.setdefault(key, (_found(found), []))[1].append(_expectation(item, found))
    for key, (found, wanted) in expected.items():
        lines.setdefault(key, []).append(f"found {found}, expected {' or '.join(dict.fromkeys(wanted))}")
    told = [f"{key}: {shortened(text, 1000)}" for key, texts in lines.items() for text in texts]
    return told[:MOST_PROBLEMS], len(items[MOST_PROBLEMS:]) + len(told[MOST_PROBLEMS:])


def _locate(loc: tuple[int | str, ...], values: Any, kind: str) -> tuple[tuple[int | str, ...], Any]:
    """The keys of a pydantic location, without the type names between them, and the value found there."""
    location: list[int | str] = []
    node = values
    for depth, part in enumerate(loc, start=1):
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if inside:
            node = node[part]
        elif kind != "missing" or depth < len(loc) or isinstance(part, int):
            continue
        location.append(part)
    return tuple(location), node


def _expectation(item: Any, found: Any) -> str:
    """What pydantic expected, in words."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        return context["expected"]
    if kind in ("too_short", "string_too_short"):
        return "at least one item" if isinstance(found, list) else "text that is not empty"
    if kind not in _EXPECTED:
        return f"a value {item['msg'].removeprefix('Input should be ')}"
    if isinstance(found, str) and re.fullmatch(r"[-+.\deE]+|true|false", found):
        return f"{_EXPECTED[kind]} without quotes"
    if kind == "string_type" and isinstance(found, bool | int | float):
        return "text in quotes"
    return _EXPECTED[kind]


def _found(value: Any) -> str:
    """A value as a message shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
        text.encode()
    except (ValueError, RecursionError):  # from a Python program: lists without end, half a character, huge numbers
        return f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else text[:77] + "..."


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _what(error: yaml.YAMLError) -> str:
    return shortened(getattr(error, "problem", None) or error, 500)
