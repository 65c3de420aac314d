"""The kinds of files that are changed: what a whole one holds, who reads it, and who judges what was accepted."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.mutations import as_json, changed_text, changed_tree, file_bytes


@dataclass(frozen=True, slots=True)
class Case:
    """One changed file. extra: what the reader and the judge need to know beside it."""

    kind: str
    number: int
    content: bytes
    extra: Any = None


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of file.

    make: the content of a changed file, and `Case.extra`.
    read: calls the program's readers and checks on a folder that holds the file; returns what they made of it.
    judge: raises `rules.Nonsense` where the content, or what was made of it, makes no sense.
    whole: unchanged files, which must be accepted.
    """

    name: str
    file: str
    make: Callable[[Random], tuple[bytes, Any]]
    read: Callable[[Path, Any], Any]
    judge: Callable[[bytes, Any, Any], None]
    whole: tuple[tuple[bytes, Any], ...]


def changed_json(rng: Random, value: Any) -> bytes:
    """The bytes of a JSON file with an entry or a few characters changed."""
    if rng.random() < 0.7:
        return as_json(changed_tree(rng, value)).encode()
    return file_bytes(rng, changed_text(rng, as_json(value)))
