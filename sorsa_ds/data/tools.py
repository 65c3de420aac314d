"""Tools that a conversation may call, and its calls of them, in the one form that chat templates take.

Storage by columns gives every tool and every call all fields that any of them has. Fields without a value are
therefore left out, as TRL does, and rows that have some are counted; what is stored as JSON text is taken as it is.
"""

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from sorsa_ds.runtime.json_text import parse_exact
from sorsa_ds.runtime.words import cut

COLUMNS = ("tools", "functions")
"""The columns that hold the schemas of a row's tools."""


NULLS = "fields that are null in the arguments or schemas of tools are left out, which JSON text would keep"
ROUNDED = "numbers in the arguments or schemas of tools have so many digits that they may have been rounded when read"
_SURE_DIGITS = 15
"""Decimal digits that a fraction keeps, whatever they are."""


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The schemas of a row's tools, each as `{"type": "function", "function": {...}}`; None where it has none.

    Raises:
        ValueError: a column of tools holds something else, or both columns hold tools.
    """
    found = {column: listed for column in COLUMNS if (listed := _list(row.get(column), column))}
    if len(found) > 1:
        raise ValueError("both columns 'tools' and 'functions' hold tools")
    for column, listed in found.items():
        return [_tool(entry, column) for entry in listed]
    return None


def calls_of(value: Any, number: int) -> list[dict[str, Any]]:
    """The calls of a message, each as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`.

    Args:
        number: the message's number, for errors.

    Raises:
        ValueError: a call has no name, or its arguments are no object.
    """
    try:
        listed = _parsed(value)
    except ValueError as error:
        raise ValueError(f"message {number} holds the call {cut(repr(value))}, {_no_json(error)}") from error
    listed = [listed] if isinstance(listed, Mapping) else listed
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise ValueError(f"message {number} holds {cut(repr(value))} where calls of tools are needed")
    return [_call(entry, number) for entry in listed]


def with_text_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of all calls as JSON text, which some templates need."""
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls") else dict(message)
        for message in messages
    ]  # fmt: skip


def lost_by(value: Any) -> set[str]:
    """What arguments of calls, or parameters of tools, lose or may have lost as objects, in words for counts."""
    if isinstance(value, Mapping):
        kept = [inner for name, inner in value.items() if name in ("arguments", "parameters")]
        return lost_by(value.get("function")).union(*map(_lost, kept))
    return set().union(*map(lost_by, value)) if isinstance(value, list | tuple) else set()


def _lost(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        inner = list(value.values())
        return ({NULLS} if any(one is None for one in inner) else set()).union(*map(_lost, inner))
    if isinstance(value, list | tuple):
        return set().union(*map(_lost, value))
    digits = repr(value).partition("e")[0].replace(".", "").strip("-0") if isinstance(value, float) else ""
    return {ROUNDED} if len(digits) > _SURE_DIGITS else set()


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _list(value: Any, column: str) -> list[Any]:
    if value is None or value == "":
        return []
    try:
        value = _parsed(value)
    except ValueError as error:
        raise ValueError(f"column {column!r} holds {cut(repr(value))}, {_no_json(error)}") from error
    if value is None:
        return []  # the text `null`, with which some writers say that there are no tools
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"column {column!r} holds {cut(repr(value))} where a list of tools is needed")
    return list(value)


def _tool(entry: Any, column: str) -> dict[str, Any]:
    try:
        tool = _parsed(entry)
    except ValueError as error:
        raise ValueError(f"column {column!r} holds the tool {cut(repr(entry))}, {_no_json(error)}") from error
    if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping):
        tool = {"type": "function", **tool}
        named = tool["function"]
    else:
        named, tool = tool, {"type": "function", "function": tool}
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        raise ValueError(f"column {column!r} holds the tool {cut(repr(entry))}, which has no name")
    return tool


def _call(entry: Any, number: int) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"message {number} holds {cut(repr(entry))} where a call of a tool is needed")
    nested = entry.get("function")
    function = nested if isinstance(nested, Mapping) else entry
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError(f"message {number} holds the call {cut(repr(entry))}, which has no name")
    try:
        arguments = {} if arguments is None or arguments == "" else _parsed(arguments)
    except ValueError as error:
        raise ValueError(
            f"message {number} calls {name} with {cut(repr(arguments))}, {_no_json(error)}; arguments are a JSON object"
        ) from error
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"message {number} calls {name} with {cut(repr(function['arguments']))}; arguments are a JSON object"
        )
    kept = {"id": entry["id"]} if entry.get("id") is not None else {}
    return {**kept, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _no_json(error: ValueError) -> str:
    """What is said of a text of which JSON, or this program, makes no value."""
    return f"which is no JSON that can be passed on ({error})"


def _parsed(value: Any) -> Any:
    """What JSON text says; what is no text, without the fields that have no value.

    Raises:
        ValueError: the text is no JSON, or the value holds what JSON cannot.
    """
    return parse_exact(value) if isinstance(value, str) else _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    if value is not None and not isinstance(value, str | int) and not (isinstance(value, float) and isfinite(value)):
        raise ValueError(f"JSON cannot hold {cut(repr(value))}")
    return value
