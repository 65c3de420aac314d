"""From text to settings and back: reading YAML and single values, checking them, writing YAML.

A value that has been read is a `Given`: it knows where it was read, so that an error message can name file and line.
"""

import dataclasses
import functools
import json
import math
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from sorsa_ds.config.declare import check_text
from sorsa_ds.config.fields import Leaf, leaves, section_help, sections
from sorsa_ds.config.yaml_reader import EXPONENT, MOST_BYTES, TAG, Reader, fault_of, line_of, parse_yaml
from sorsa_ds.runtime.words import cut

T = TypeVar("T")


class _Writer(yaml.SafeDumper):
    """Writes YAML that quotes any text which YAML 1.1 or 1.2 would read as something else than text."""


_Writer.add_implicit_resolver(f"{TAG}float", re.compile(f"^{EXPONENT}$"), [*"-+0123456789."])


@dataclasses.dataclass(frozen=True)
class Given:
    """A value as the user gave it. text: its spelling, if it is one word; where: its file and line, or argument."""

    value: Any
    text: str | None
    where: str


def read_value(text: str, where: str, plain: bool = False) -> Given:
    """One value from the command line. Text that is not YAML, such as `*.q_proj`, stays text.

    Args:
        plain: whether the setting is text and nothing else: `{{ question }}` is then no broken mapping.

    Raises:
        ValueError: the text begins like a list or mapping and is not valid YAML.
    """
    try:
        return Given(parse_yaml(text), text, where)
    except yaml.YAMLError as error:
        if text.lstrip()[:1] in ("[", "{") and not plain:
            raise ValueError(
                f"cannot read the value ({fault_of(error)}); quote names with * in a list ({where})"
            ) from None
        return Given(text, text, where)


def read_yaml(file: Path, schema: type) -> dict[str, Given]:
    """A YAML file as dotted path -> value. Whether keys and values are valid is checked later.

    Raises:
        ValueError: the file cannot be read, is not valid YAML, or sets a key twice. The message names file and line.
    """
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"{file}: is larger than the {MOST_BYTES:,} bytes that settings may have")
        loader = Reader(file.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            line = root.start_mark.line + 1
            raise ValueError(f"{file}:{line}: settings are expected (`train:` and so on), not a single value or list")
        given: dict[str, Given] = {}
        for path, node in _walk(root, "", schema):
            where = f"{file}:{node.start_mark.line + 1}"
            if path in given:
                raise ValueError(f"{path} is set twice ({given[path].where} and {where})")
            text = node.value if isinstance(node, yaml.ScalarNode) else None
            given[path] = Given(loader.construct_object(node, deep=True), text, where)
    except yaml.YAMLError as error:
        line = f":{line_of(error)}" if line_of(error) else ""
        raise ValueError(f"{file}{line}: not valid YAML ({fault_of(error)})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return given


def _walk(node: yaml.MappingNode, prefix: str, schema: type) -> Iterator[tuple[str, yaml.Node]]:
    """The dotted path and node of each setting below a node; only sections of the schema are descended into."""
    begun: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be the name of a setting", problem_mark=key.start_mark)
        path = f"{prefix}{key.value}"
        if path not in sections(schema):
            yield path, value
            continue
        if path in begun:
            raise yaml.MarkedYAMLError(problem=f"the section {path} stands twice", problem_mark=key.start_mark)
        begun.add(path)
        if isinstance(value, yaml.MappingNode):
            yield from _walk(value, f"{path}.", schema)
        elif value.tag != f"{TAG}null":  # an empty section says nothing
            yield path, value


def check_value(leaf: Leaf, given: Given) -> Any:
    """The value in its setting's type.

    Raises:
        ValueError: the value has another type or lies outside the range. The message says what is allowed.
    """
    value = given.value
    if leaf.is_text and given.text is not None and isinstance(value, bool | int | float | list | dict):
        value = given.text  # a run may be named 123, and a prompt be {question}
    try:
        for text in texts_in(value):
            check_text(text)
        return TypeAdapter(leaf.annotation).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        own = [wrong["msg"].removeprefix("Value error, ") for wrong in error.errors() if wrong["type"] == "value_error"]
        reason = own[0] if own else f"must be {leaf.type_text}{_place(error)}"
        raise ValueError(f"{leaf.path} = {cut(repr(value))}: {reason} ({given.where})") from None
    except ValueError as error:
        raise ValueError(f"{leaf.path} = {cut(repr(value))}: {error} ({given.where})") from None


def _place(error: ValidationError) -> str:
    """Where in a list of mappings a value is wrong, and why; empty for simpler values."""
    wrong = error.errors()[0]
    element, *inner = wrong["loc"] or ("",)
    if not inner or not isinstance(element, int):
        return ""
    return f"; {'.'.join(map(str, inner))} of element {element + 1}: {wrong['msg']}"


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value: the keys and values of dictionaries, and the elements of lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (text for element in value for text in texts_in(element))
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for element in pair for text in texts_in(element))


def build_settings(schema: type[T], values: Mapping[str, Any]) -> T:
    """A configuration from checked values by dotted path. Settings without a value keep their default.

    Raises:
        ValueError: values contradict each other.
    """
    owner: type = schema  # a `type[T]` is not hashable for the type checker
    parts = {path: value for path, value in values.items() if "." not in path}
    for name, section in sections(owner).items():
        inner = {path.partition(".")[2]: value for path, value in values.items() if path.startswith(f"{name}.")}
        parts[name] = build_settings(section, inner)
    try:
        return schema(**parts)
    except ValidationError as error:  # raised by a class's own checks, as each value alone has passed `check_value`
        raise ValueError("\n".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from None


def flat(settings: Mapping[str, Any], prefix: str = "", schema: type | None = None) -> dict[str, Any]:
    """Nested settings as dotted path -> value, with tuples as lists.

    Args:
        prefix: what the paths begin with.
        schema: the class of the settings, whose settings that are mappings are values; None: no mapping is one.
    """
    mappings = {path for path, leaf in leaves(schema).items() if leaf.is_mapping} if schema else set()
    found: dict[str, Any] = {}

    def collect(nested: Mapping[str, Any], path: str) -> None:
        for key, value in nested.items():
            if isinstance(value, dict) and f"{path}{key}" not in mappings:
                collect(value, f"{path}{key}.")
            else:
                found[f"{prefix}{path}{key}"] = list(value) if isinstance(value, tuple) else value

    collect(settings, "")
    return found


def to_yaml(config: Any, comments: bool = False, only: Collection[str] | None = None) -> str:
    """A configuration as YAML text, from which an equal configuration can be read.

    Args:
        comments: whether to write the help, type and default of each key above it.
        only: the dotted paths to write; None: all. They are written in the order of declaration.
    """
    schema: type = type(config)
    lines: list[str] = []
    section = ""
    for path, leaf in leaves(schema).items():
        if only is not None and path not in only:
            continue
        head, _, name = path.rpartition(".")
        if head != section:
            section = head
            lines += ["", *_comment(section_help(schema, head), "")] if comments else []
            lines.append(f"{head}:")
        indent = "  " if head else ""
        if comments:
            lines += _comment(leaf.help, indent)
            lines += _comment(f"({leaf.type_text}; default {value_text(leaf.default)})", indent)
        value = functools.reduce(getattr, path.split("."), config)
        lines.append(f"{indent}{name}: {value_text(value)}")
    return "\n".join(lines) + "\n"


def value_text(value: Any) -> str:
    """A value as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    if isinstance(value, list):
        plain = [_plain(element) for element in value]
    style = '"' if isinstance(value, str) and "\n" in value else None
    text = yaml.dump(plain, Dumper=_Writer, default_flow_style=True, width=math.inf, default_style=style)
    return text.removesuffix("...\n").strip()


def _plain(element: Any) -> Any:
    """An element of a list; the settings of one as a mapping, without those that are unset."""
    if not dataclasses.is_dataclass(element) or isinstance(element, type):
        return element
    return {name: value for name, value in dataclasses.asdict(element).items() if value is not None}


def _comment(text: str, indent: str) -> list[str]:
    """A text as wrapped lines of comment."""
    mark = f"{indent}# "
    return textwrap.wrap(text, 110, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False)
