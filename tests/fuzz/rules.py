"""Rules of what a value may be, and how a file is held against a table of them, without asking the program."""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

Rule = Callable[[Any], bool]
LARGEST = 10**9
DEEPEST = 64


def flag(value: Any) -> bool:
    """true or false."""
    return value is True or value is False


def never(value: Any) -> bool:
    """No value at all."""
    return False


def name(value: Any) -> bool:
    """Text that names a file, a folder or something on the hub."""
    return words(value) and value != "" and all(len(part.encode()) < 256 for part in value.split("/"))


def nothing(value: Any) -> bool:
    """null."""
    return value is None


def utf8(value: Any) -> bool:
    """Text that can be written to a file."""
    return type(value) is str and not any("\ud800" <= character <= "\udfff" for character in value)


def words(value: Any) -> bool:
    """Text that can name a file."""
    return utf8(value) and "\0" not in value


def whole(least: int, most: int) -> Rule:
    """An integer in these bounds."""
    return lambda value: type(value) is int and least <= value <= most


def power(least: int, most: int) -> Rule:
    """A whole number in these bounds, which may be written as 2e8."""
    return lambda value: type(value) in (int, float) and least <= value <= most and value == int(value)


def real(least: float, most: float, *, above: bool = False, below: bool = False) -> Rule:
    """A number in these bounds; without the least one itself (above), or the largest (below)."""

    def rule(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return (least < value if above else least <= value) and (value < most if below else value <= most)

    return rule


def one_of(*values: Any) -> Rule:
    """One of these, of the same type too."""
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def either(*rules: Rule) -> Rule:
    """What one of the rules allows."""
    return lambda value: any(rule(value) for rule in rules)


def many(rule: Rule) -> Rule:
    """A list of what the rule allows."""
    return lambda value: type(value) is list and all(map(rule, value))


def mapping(key: Rule, inside: Rule) -> Rule:
    """An object whose keys and values these rules allow."""
    return lambda value: type(value) is dict and all(key(k) and inside(v) for k, v in value.items())


def relative_gamma(value: Any) -> bool:
    """A strength such as `0.2*lr`."""
    found = re.fullmatch(r"([0-9.eE+-]+)\*lr", value.replace(" ", "")) if type(value) is str else None
    try:
        return found is not None and 0 <= float(found[1]) <= LARGEST
    except ValueError:
        return False


def blocks(value: Any) -> bool:
    """`all`, the number of a block, or a range of them such as `8-15`."""
    if type(value) is not str:
        return whole(0, 9999)(value)
    found = re.fullmatch(r"([0-9]{1,4}) *- *([0-9]{1,4})", value)
    return value == "all" or (found is not None and int(found[1]) <= int(found[2]))


class Nonsense(Exception):
    """A file makes no sense; the message says why."""


def decoded(content: bytes, encoding: str = "utf-8") -> str:
    """The text of a file.

    Raises:
        Nonsense: the bytes are not in this encoding.
    """
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise Nonsense(f"not {encoding}: {error}") from error


def strict_json(text: str) -> Any:
    """The value of a JSON text by the letter of the standard.

    Raises:
        Nonsense: the text is not JSON, has a key twice or a number that is none, or is nested too deeply.
    """

    def constant(name: str) -> None:
        raise Nonsense(name)

    [value] = _values(text, constant, most=1)
    if depth(value) > DEEPEST:
        raise Nonsense("nested too deeply")
    return value


class Written(str):
    """A number as it is written."""


def json_values(text: str) -> list[Any]:
    """The values of a text in which JSON follows JSON, with numbers as they are written.

    NaN and Infinity stand for null, as readers of data take them.

    Raises:
        Nonsense: the text is not JSON, or has a key twice.
    """
    return _values(text, lambda name: None, number=Written)


def _values(
    text: str, constant: Callable[[str], Any], most: int | None = None, number: Callable[[str], Any] | None = None
) -> list[Any]:
    """The values of a text, at most so many."""

    def pairs(found: list[tuple[str, Any]]) -> dict:
        if len(dict(found)) < len(found):
            raise Nonsense("a key stands twice")
        return dict(found)

    decoder = json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant, parse_int=number, parse_float=number)
    found, place, blank = [], 0, " \t\r\n"
    try:
        while rest := text[place:].lstrip(blank):
            if len(found) == most:
                raise Nonsense("something follows the value")
            value, length = decoder.raw_decode(rest)
            place = len(text) - len(rest) + length
            found.append(value)
    except (ValueError, RecursionError) as error:
        raise Nonsense(f"not JSON: {error}") from error
    if most and not found:
        raise Nonsense("nothing")
    return found


def depth(value: Any) -> int:
    """How many lists and objects are inside one another."""
    level, deep = [value], 0
    while level := [inner for inner in level if isinstance(inner, list | dict)]:
        deep += 1
        level = [one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer)]
    return deep


def entries(value: dict, rules: dict[str, Rule], empty: Rule, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted path and value of every entry, with sections of the table gone into.

    Raises:
        Nonsense: a section is neither an object nor what may stand for an empty one.
    """
    for key, inner in value.items():
        path = f"{prefix}{key}"
        if path in rules or not any(known.startswith(f"{path}.") for known in rules):
            yield path, inner
        elif isinstance(inner, dict):
            yield from entries(inner, rules, empty, f"{path}.")
        elif not empty(inner):
            raise Nonsense(f"{path} is no object")


def check(
    value: Any, rules: dict[str, Rule], *, needs: tuple[str, ...] = (), anywhere: Rule = never, empty: Rule = never,
    ignored: Rule = never,
) -> None:  # fmt: skip
    """Check every entry of an object against a table.

    Args:
        needs: dotted paths that must be there.
        anywhere: what may stand for any value. empty: what may stand for a section.
        ignored: whether an entry that is not in the table may be there, by its path.

    Raises:
        Nonsense: an entry is missing or not in the table, or has a value that its rule does not allow.
    """
    if not isinstance(value, dict):
        raise Nonsense("no object")
    for path, inner in entries(value, rules, empty):
        if path not in rules:
            if not ignored(path):
                raise Nonsense(f"there is no entry {path[:80]!r}")
        elif not (rules[path](inner) or anywhere(inner)):
            raise Nonsense(f"{path} is {str(inner)[:80]!r}")
    for path in needs:
        if not has(value, path):
            raise Nonsense(f"{path} is missing")


def has(value: Any, path: str) -> bool:
    """Whether an entry is there, by its dotted path."""
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True
