"""JSON as text: whatever is wrong with it, read or to be written, is a ValueError in words."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

DEEPEST = 64
"""The largest number of lists and objects inside one another that is read. What this program writes has less than ten;
functions that walk through a value call themselves once or more for each."""


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text stands for.

    Raises:
        ValueError: the text is not JSON or not UTF-8, is nested more than DEEPEST deep, holds NaN or Infinity, which
            are no JSON, or sets a key of an object twice; a `json.JSONDecodeError` where there is a line and a column.
    """
    try:
        value = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    check_depth(value)
    return value


def parse_exact(text: str) -> Any:
    """The value of a JSON text in which every number stands as Python writes it, so that it can be written again.

    Raises:
        ValueError: `parse_json` refuses the text, or a number in it would be written otherwise, as `1.50` and `1e400`.
    """
    try:
        value = _EXACT.decode(text)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    check_depth(value)
    return value


def strict_decoder(number: Callable[[str], Any] | None = None, nan: bool = False) -> json.JSONDecoder:
    """A decoder that raises ValueError where an object sets a key twice, and for Infinity, which is no JSON.

    Args:
        number: makes the value of a number from how it is written; None: an int or a float.
        nan: take NaN, as programs write it where a value is missing, for null; it is refused otherwise.
    """

    def constant(name: str) -> None:
        if not (nan and name == "NaN"):
            _refuse_constant(name)

    return json.JSONDecoder(
        object_pairs_hook=_no_repeats, parse_int=number, parse_float=number, parse_constant=constant
    )


def finite_json(value: Any, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """The JSON text of a value.

    Raises:
        ValueError: a number in it is NaN or infinite, which JSON cannot hold. The message names the number's place.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError as error:
        place, number = next(_not_finite(value, ""), ("", error))
        raise ValueError(f"{place or 'a number'} is {number}, which JSON cannot hold") from error


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """The dotted place and the value of every number that is NaN or infinite."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from _not_finite(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, float) and not math.isfinite(value):
        yield place, value


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


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its pairs; a ValueError where a key appears twice, of which Python would keep the last."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'"{key[:80]}" is set twice')
        found[key] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _exact(written: str) -> int | float:
    value = int(written) if written.removeprefix("-").isdigit() else float(written)
    if repr(value) != written:
        raise ValueError(f"the number {written[:80]} would be written as {value!r}; write it so, or as text in quotes")
    return value


_EXACT = strict_decoder(number=_exact)
