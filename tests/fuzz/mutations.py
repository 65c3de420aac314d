"""Seeded changes of a text, of a value made of lists and objects, and of a table of cells."""

import json
from copy import deepcopy
from random import Random
from typing import Any

NUMBERS = (0, -1, 1, 2, 3, 7, 64, 10**6, 10**9, 2**31, 2**63, 10**18, -(10**18), 10**400, 0.5, 1.0, 1e-9, 1e300, -0.1)
TEXTS = (
    "",
    "x",
    "auto",
    "1",
    "1e3",
    "true",
    "null",
    "a\0b",
    "\ud800",
    "../../etc/passwd",
    "\x1b[31m",
    "a\nb",
    "é日本",
    "*q",
)
JUNK = (
    None, True, False, *NUMBERS, *TEXTS, float("nan"), float("inf"), "y" * 20_000, [], {}, [[]], [1], ["x"], {"a": 1},
    {"enabled": True}, [None], {"": ""},
)  # fmt: skip
"""Values that may stand where another is expected; some make sense somewhere."""
SNIPPETS = ("\0", "\ufeff", "\x1b[2J", "'", '"', "[" * 200, "{" * 200, "&a [*a, *a]", "!!python/name:os.system ", "]",
            "}", ",", ": ", "\n", "\r\n", "\t", "9" * 400, "9" * 5000, "NaN", "-Infinity", "1e999", "\\ud800",
            "\\u0000", "null", "<<: *b")  # fmt: skip


def junk(rng: Random) -> Any:
    """A value that may make no sense."""
    if rng.random() < 0.03:
        value: Any = 1
        for _ in range(rng.choice((70, 400))):
            value = [value]
        return value
    return deepcopy(rng.choice(JUNK))


def as_json(value: Any) -> str:
    """A value as JSON, with what Python adds to JSON."""
    return json.dumps(value, ensure_ascii=True)


def changed_text(rng: Random, text: str) -> str:
    """The text with a few characters, a span or a line changed."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        end = min(end, place + rng.choice((1, 1, 3, 20, 200)))
        lines = text.split("\n")
        text = rng.choice((
            lambda place=place, end=end, text=text: text[:place] + text[end:],
            lambda place=place, text=text: text[:place],
            lambda place=place, text=text: text[:place] + rng.choice(SNIPPETS) + text[place:],
            lambda place=place, end=end, text=text: text[:place] + text[place:end] * 2 + text[end:],
            lambda place=place, text=text: text[:place] + chr(rng.randrange(1, 0x250)) + text[place + 1 :],
            lambda lines=lines: "\n".join(rng.sample(lines, len(lines))),
            lambda lines=lines: "\n".join([*lines, rng.choice(lines)]),
        ))()  # fmt: skip
    return text


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every entry and element in a value, as a tuple of keys and indices."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [one for key, inner in pairs for one in ((*path, key), *places(inner, (*path, key)))]
    return []


def changed_tree(rng: Random, value: Any) -> Any:
    """A copy of a value with one or two entries set to junk, taken away, renamed, added or exchanged."""
    tree = deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2))):
        found = places(tree)
        if not found:
            return tree
        path = rng.choice(found)
        above = at(tree, path[:-1])
        kind = rng.randrange(8)
        if kind < 4:
            above[path[-1]] = junk(rng)
        elif kind == 4:
            del above[path[-1]]
        elif kind == 5 and isinstance(above, dict):
            above[rng.choice(("unheard_of", "", "é", f"{path[-1]}_", "a.b"))] = junk(rng)
        elif kind == 6 and isinstance(above, dict):
            above[f"{path[-1]}s"] = above.pop(path[-1])
        else:
            above[path[-1]] = deepcopy(at(tree, rng.choice(found)))
    return tree


def at(value: Any, path: tuple) -> Any:
    """What stands at a path in a value."""
    for key in path:
        value = value[key]
    return value


def file_bytes(rng: Random, text: str) -> bytes:
    """The bytes of a file with this text, a few of them in another encoding or not to be decoded at all."""
    if rng.random() < 0.04:
        return text.encode("utf-16", "surrogatepass")
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if content and rng.random() < 0.04:
        content[rng.randrange(len(content))] = rng.randrange(128, 256)
    return bytes(content)
