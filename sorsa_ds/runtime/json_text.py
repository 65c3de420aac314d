"""Reading JSON that others have written: whatever is wrong with it is a ValueError in words."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DEEPEST = 64
"""The largest number of lists and objects inside one another that is read. What this program writes has less than ten;
functions that walk through a value call themselves once or more for each."""


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value that a JSON text stands for.

    Args:
        pairs: makes an object of its (key, value) pairs; None: a dictionary, in which the last of equal keys counts.

    Raises:
        ValueError: the text is not JSON or not UTF-8, is nested more than DEEPEST deep, or holds NaN or Infinity, which
            are no JSON; a `json.JSONDecodeError` where there is a line and a column.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    check_depth(value)
    return value


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: the file cannot be read, or `parse_json` refuses what is in it. The message names the file.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def check_depth(value: Any) -> None:
    """Stop where lists and dictionaries are nested too deeply.

    Raises:
        ValueError: more than DEEPEST of them are inside one another.
    """
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _within(outer)]
    if any(isinstance(inner, list | dict) for inner in level):
        raise ValueError(_too_deep())


def _within(outer: Any) -> Iterable[Any]:
    """What is directly inside a list or dictionary; nothing where the value is neither."""
    return outer if isinstance(outer, list) else outer.values() if isinstance(outer, dict) else ()


def _too_deep() -> str:
    return f"more than {DEEPEST} lists and objects are inside one another"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")
