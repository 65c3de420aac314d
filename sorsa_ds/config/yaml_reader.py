"""Reading YAML by the rules of version 1.2, as far as settings need it: no tags, no aliases, no depth without end."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from sorsa_ds.runtime.json_text import DEEPEST

MOST_BYTES = 2**20
"""The largest YAML file that is read: PyYAML takes seconds for a mebibyte, and settings take a few kibibytes."""
TAG = "tag:yaml.org,2002:"
EXPONENT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"


class Reader(yaml.SafeLoader):
    """Reads YAML by the rules of version 1.2: 1e-3 is a number, `off` and `no` are text, and dates stay text.

    Refused is what settings have no use for: aliases, with which a few lines can stand for a billion; tags, which
    choose the type of a value; a key that stands twice in a mapping; and values that are nested too deeply.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's class attribute, emptied of the rules of version 1.1)

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node, with all that is in it."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error("an alias (*name) is not read: quote a text that begins with *", event)
        if event.tag is not None:
            raise _error("a tag (!name) is not read: quote a text that begins with !", event)
        if self._depth > DEEPEST:
            raise _error(f"more than {DEEPEST} lists and mappings are inside one another", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The dictionary that a mapping stands for."""
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise _error("a key stands twice in this mapping", node)
        return found

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        """The whole number that a scalar stands for."""
        try:
            return int(node.value)
        except ValueError as error:  # Python reads no number of more than some thousand digits
            raise _error("a number has too many digits", node) from error


for _name, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("null", "~|null|Null|NULL|", [*"~nN", ""]),
    ("int", "[-+]?[0-9]+", [*"-+0123456789"]),
    ("float", rf"{EXPONENT}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+0123456789."]),
):
    Reader.add_implicit_resolver(f"{TAG}{_name}", re.compile(f"^(?:{_pattern})$"), _first)
Reader.add_constructor(f"{TAG}int", Reader.construct_whole)
Reader.add_constructor(f"{TAG}float", lambda loader, node: float(re.sub(r"\.(?=[in])", "", node.value.lower())))


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        yaml.YAMLError: the text is not YAML, or holds what `Reader` refuses.
    """
    return yaml.load(text, Reader)


def fault_of(error: yaml.YAMLError) -> str:
    """What a library's error says is wrong, in one line."""
    return " ".join(str(getattr(error, "problem", None) or error).split())


def line_of(error: yaml.YAMLError) -> int | None:
    """The line, from 1, at which reading failed; None where the library does not tell it."""
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark else None


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    """An error at the place of an event or node."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)
