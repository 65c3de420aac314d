"""Which settings a configuration class has, each with its path, type, range, default and help.

All of it is read from the dataclasses. It works for any class made with `sorsa_ds.config.declare.settings`, and no
setting is known by name here.
"""

import dataclasses
import difflib
import functools
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

_ALIKE = 0.75
"""How similar a name must be to one that is known to be taken for a slip of the fingers. Of other words for the same
thing, which are further away, spelling says nothing."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One setting: its dotted path, its type with the allowed range, its default and its help text."""

    path: str
    annotation: Any
    default: Any
    help: str

    @property
    def type_text(self) -> str:
        """The type and its range in words."""
        return describe_type(self.annotation)

    @property
    def is_text(self) -> bool:
        """Whether the value is text and nothing else, so that a word such as 123 or true means itself."""
        kinds = {_bare(kind) for kind in get_args(self.annotation) or (self.annotation,)}
        return _bare(self.annotation) is str or kinds == {str, type(None)}

    @property
    def is_mapping(self) -> bool:
        """Whether the value is a mapping, which is one value and no section."""
        return any(get_origin(_bare(kind)) is dict for kind in (self.annotation, *get_args(self.annotation)))


@functools.cache
def leaves(schema: type, prefix: str = "") -> dict[str, Leaf]:
    """Every setting of a configuration class: dotted path -> setting, in the order of declaration."""
    hints: dict[str, Any] = get_type_hints(schema, include_extras=True)
    found: dict[str, Leaf] = {}
    for name, field in schema.__pydantic_fields__.items():  # type: ignore[attr-defined]  # pydantic sets it
        path = prefix + name
        if dataclasses.is_dataclass(hints[name]):
            found |= leaves(hints[name], f"{path}.")
        else:
            default = field.get_default(call_default_factory=True)
            found[path] = Leaf(path, hints[name], default, " ".join((field.description or "").split()))
    return found


@functools.cache
def sections(schema: type) -> dict[str, type]:
    """The sections of a configuration class: name -> its dataclass."""
    hints: dict[str, Any] = get_type_hints(schema)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


def section_help(schema: type, name: str) -> str:
    """The docstring of a section in one paragraph. The empty name stands for the whole configuration class."""
    owner = sections(schema)[name] if name else schema
    return " ".join((owner.__doc__ or "").split())


def describe_type(annotation: Any) -> str:
    """A type with its range in words: `integer from 1 to 65,536`, `auto | fp32`, `list of text or text`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        rules = [rule for extra in args[1:] if isinstance(extra, FieldInfo) for rule in extra.metadata]
        if any(getattr(rule, "min_length", 0) for rule in rules):
            return f"{describe_type(args[0])} that is not empty"
        limits = {key: f"{getattr(rule, key):,}" for rule in rules for key in _SIGNS if hasattr(rule, key)}
        if limits.keys() == {"ge", "le"}:
            return f"{describe_type(args[0])} from {limits['ge']} to {limits['le']}"
        signed = " and ".join(f"{_SIGNS[key]} {limit}" for key, limit in limits.items())
        return f"{describe_type(args[0])} {signed}".rstrip()
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if origin is list:
        return f"list of {describe_type(args[0])}"
    if origin is tuple:
        return f"list [{', '.join(map(describe_type, args))}]"
    if origin is dict:
        return f"mapping of {describe_type(args[0])} to {describe_type(args[1])}"
    if dataclasses.is_dataclass(annotation):
        return f"mapping with {', '.join(field.name for field in dataclasses.fields(annotation))}"
    return _NAMES[annotation]


def _bare(annotation: Any) -> Any:
    """A type without its range."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def nearest(path: str, known: Iterable[str]) -> list[str]:
    """The valid keys that a wrong key probably stands for.

    These are the keys with the same last name (the most similar one of them, where the wrong key names a section); if
    there are none, the key whose last name is most similar; if none is similar enough, no key.
    """

    def alike(a: str, b: str) -> float:
        """The similarity of two texts, 0 to 1."""
        return difflib.SequenceMatcher(None, a, b).ratio()

    known = list(known)
    section, _, name = path.rpartition(".")
    names = {key: key.rpartition(".")[2].lstrip("-") for key in known}
    same = [key for key in known if names[key] == name]
    if same:
        return [max(same, key=lambda key: alike(path, key))] if section else same
    best = max(known, key=lambda key: (alike(name, names[key]), alike(path, key)))
    return [best] if alike(name, names[best]) >= _ALIKE else []
