"""The reference of all keys, from their descriptions; running this module writes the page."""

import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rlhf_ray.config.keys import fields, section_of
from rlhf_ray.config.load import CONFIGS, Kind
from rlhf_ray.config.pipeline import STAGE_CONFIGS

PAGE = Path("docs/configuration.md")

_TITLES: dict[Kind, str] = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "dpo": "DPO",
    "ppo": "PPO",
    "pipeline": "Pipeline",
}
_INTRODUCTION = """# Configuration

Every run is described by one YAML file, read with the rules of YAML 1.2 (`1e-4` is a number, `off` is text).
Any key can be overridden on the command line with `section.key=value`; items of a list go by index, as in
`reward.models.0.weight=2`. Unknown keys, keys given twice and values that contradict each other are refused
before anything starts.

In a pipeline, the sections `sft`, `reward`, `dpo` and `ppo` hold the keys of their own tables below, without
`run` and `tracking`; a model that an earlier stage trains may be left out.

This page is generated from the descriptions in `rlhf_ray/config` by `python -m rlhf_ray.config.reference`.
"""


def config_reference(kind: Kind) -> str:
    """A Markdown table of all keys of one kind of configuration: type, default and meaning."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in fields(CONFIGS[kind]):
        inside_stage = kind == "pipeline" and key.partition(".")[0] in STAGE_CONFIGS and "." in key
        if not inside_stage and section_of(field.annotation)[0] is not field.annotation:
            rows.append(f"| `{key}` | {_type(field)} | {_default(field)} | {field.description} |")
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for kind, title in _TITLES.items():
        parts += [f"## {title}\n", config_reference(kind) + "\n"]
    return "\n".join(parts)


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if hasattr(bound, name)
    ]
    return ", ".join([_annotation(field.annotation), *bounds])


def _annotation(annotation: Any) -> str:
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if annotation is types.NoneType:
        return "null"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_annotation(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"list of {_annotation(arguments[0])}"
    if origin is dict:
        return f"mapping of {_annotation(arguments[0])} to {_annotation(arguments[1])}"
    return {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "value"}.get(
        annotation, "section"
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{json.dumps(field.get_default(call_default_factory=True))}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
