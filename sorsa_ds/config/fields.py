"""What settings a configuration class has: path, type with its range, default, help. Read from the dataclasses alone.

Works for any tree declared with `sorsa_ds.config.schema.settings`; nothing here knows a single setting by name.
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


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One setting: its dotted path, type (with range), default and help text."""

    path: str
    annotation: Any
    default: Any
    help: str

    @property
    def type_text(self) -> str:
        """The type in words."""
        return describe(self.annotation)


@functools.cache
def leaves(schema: type, prefix: str = "") -> dict[str, Leaf]:
    """Every setting of a configuration class, by dotted path, in the order of declaration."""
    hints = get_type_hints(schema, include_extras=True)
    found: dict[str, Leaf] = {}
    for name, field in schema.__pydantic_fields__.items():
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
    return {name: hint for name, hint in get_type_hints(schema).items() if dataclasses.is_dataclass(hint)}


def section_help(schema: type, name: str) -> str:
    """The first docstring of a section in one paragraph; of the whole class for the name ''."""
    owner = sections(schema)[name] if name else schema
    return " ".join((owner.__doc__ or "").split())


def describe(annotation: Any) -> str:
    """A type in words, with its range: `integer >= 1`, `auto | fp32`, `list of text or text`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        rules = [rule for extra in args[1:] if isinstance(extra, FieldInfo) for rule in extra.metadata]
        limits = [
            f"{sign} {getattr(rule, key):g}" for rule in rules for key, sign in _SIGNS.items() if hasattr(rule, key)
        ]
        return f"{describe(args[0])} {' and '.join(limits)}"
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is list:
        return f"list of {describe(args[0])}"
    if origin is tuple:
        return f"list [{', '.join(map(describe, args))}]"
    if origin is dict:
        return f"mapping of {describe(args[0])} to {describe(args[1])}"
    return _NAMES[annotation]


def nearest(path: str, known: Iterable[str]) -> list[str]:
    """The valid keys that a wrong one probably means.

    Keys of the same last name come first (all of them, where no section was written), else the one whose last
    name is most alike, else none.
    """

    def alike(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    known = list(known)
    section, _, name = path.rpartition(".")
    names = {key: key.rpartition(".")[2].lstrip("-") for key in known}
    same = [key for key in known if names[key] == name]
    if same:
        return [max(same, key=lambda key: alike(path, key))] if section else same
    best = max(known, key=lambda key: (alike(name, names[key]), alike(path, key)))
    return [best] if alike(name, names[best]) >= 0.6 else []
