"""YAML as configuration files use it: the core schema of YAML 1.2, and no mapping with the same key twice.

PyYAML follows YAML 1.1, where `1e-4` is text, `off` is false and `010` is eight. What a text may hold is bounded,
so that a few lines of aliases do not become more values than there is memory for.
"""

import re
from typing import Any

import yaml

from rlhf_ray.errors import shortened

# A configuration with all its keys and comments has 10,000; PyYAML takes seconds for this many.
MOST_CHARACTERS = 2**18
# Values with those that aliases repeat, and levels of sections and lists in each other.
MOST_VALUES = 100_000
MOST_LEVELS = 50

_TAG = "tag:yaml.org,2002:"
_RULES = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - the base class declares it
    # None of YAML 1.1's dates, sets and binary values: no key takes one, and some that are no date raise no YAMLError.
    yaml_constructors = {  # noqa: RUF012 - the base class declares it
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(_TAG + name for name in ("null", "str", "seq", "map")))
    }

    def __init__(self, stream):
        super().__init__(stream)
        self._levels_above = 0
        # Of each node: values in it, with those that aliases repeat, and levels.
        self._extents: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent, index):
        """Composes a node, and refuses one that aliases make too large, too deep or endless."""
        mark = self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        self._levels_above += 1
        if self._levels_above > MOST_LEVELS:  # before the recursion goes deeper than Python allows
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MOST_LEVELS} levels", mark)
        node = super().compose_node(parent, index)
        assert node is not None
        self._levels_above -= 1
        if is_alias and node not in self._extents:
            raise yaml.composer.ComposerError(None, None, "an alias of what it stands in, which has no end", mark)
        if node not in self._extents:
            self._extents[node] = self._extent(node)
        values, levels = self._extents[node]
        if self._levels_above + levels > MOST_LEVELS:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MOST_LEVELS} levels", mark)
        if values > MOST_VALUES:
            problem = f"more than {MOST_VALUES} values, with those that aliases repeat"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        return node

    def _extent(self, node):
        if isinstance(node, yaml.MappingNode):
            inner = [self._extents[one] for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = [self._extents[one] for one in node.value]
        else:
            return 1, 1
        return 1 + sum(values for values, _ in inner), 1 + max((levels for _, levels in inner), default=0)

    def construct_scalar(self, node):
        """Builds a text that can be printed, written and, where it is a path, opened."""
        text = super().construct_scalar(node)
        if re.search("[\ud800-\udfff]", text):
            try:  # JSON writes a character beyond 16 bits as two
                text = text.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise _refused(node, "an unpaired surrogate escape, which is no character") from None
        if "\0" in text:
            raise _refused(node, "a NUL character, which no name or path can have")
        return text

    def construct_mapping(self, node, deep=False):
        """Builds a mapping whose keys are distinct text."""
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refused(key_node, f"the key {shortened(repr(key))} is not text")
            if key in seen:
                raise _refused(key_node, f"the key {shortened(repr(key))} appears twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_bool(self, node):
        """Builds true or false."""
        return self._text_of("bool", node).lower() == "true"

    def construct_integer(self, node):
        """Builds a whole number of 64 bits: decimal, `0o` octal or `0x` hexadecimal."""
        text = self._text_of("int", node)
        # Python refuses to convert thousands of digits.
        number = int(text, 0 if text.startswith(("0o", "0x")) else 10) if len(text) < 100 else 2**64
        if not -(2**63) <= number < 2**63:
            raise _refused(node, f"{shortened(text, 30)} is no number of 64 bits; make it smaller")
        return number

    def construct_float(self, node):
        """Builds a number."""
        return float(self._text_of("float", node).lower().replace(".inf", "inf").replace(".nan", "nan"))

    def _text_of(self, name, node):
        """The text of a node that a tag may have put where it is none."""
        text = self.construct_scalar(node)
        if not any(re.fullmatch(pattern, text) for rule, pattern, _ in _RULES if rule == name):
            raise _refused(node, f"{shortened(repr(text))} is no {name}")
        return text


def _refused(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - the base class declares it

    def ignore_aliases(self, data):
        """Writes equal values out each time."""
        return True


for _name, _pattern, _first in _RULES:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor(_TAG + "bool", _Loader.construct_bool)
_Loader.add_constructor(_TAG + "int", _Loader.construct_integer)
_Loader.add_constructor(_TAG + "float", _Loader.construct_float)


def parse_yaml(text: str) -> Any:
    """Parses one YAML document.

    Raises:
        yaml.YAMLError: the text is not YAML, holds a key twice or a key that is not text, or holds too much.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"{len(text)} characters; at most {MOST_CHARACTERS} are read")
    try:
        return yaml.load(text, Loader=_Loader)
    except ValueError as error:  # an escape of a character that does not exist
        raise yaml.YAMLError(f"a value that is none ({error})") from error


def dump_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
