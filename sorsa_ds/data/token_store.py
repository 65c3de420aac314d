"""Examples in files, from which they are read when they are asked for.

A folder holds the tokens of all examples one behind the other, for each first its ids and then its labels, as int32
numbers; the lengths; and what else is known of them.
Shapes: N examples.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sorsa_ds.data.counts import Counts
from sorsa_ds.data.tokenize import IGNORED, Encoded, Example
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.files import write_json
from sorsa_ds.runtime.json_text import read_json

_TOKENS, _LENGTHS, _FACTS = "tokens.bin", "lengths.npy", "facts.json"
_BYTES = np.dtype(np.int32).itemsize


class Tokens(Protocol):
    """Something that gives a slice of int32 numbers: an array, or a file of them."""

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Examples:
    """Examples that are read from a file when they are asked for, so that a rank's memory does not grow with them.

    What a rank does hold is 12 bytes for each example.

    Attributes:
        lengths: the number of tokens of each example; (N,) int32.
        counts: what has become of the rows that the examples were made of.
        digest: the digest of the tokens and labels of all examples in their order. It is the same on every rank, and
            tells whether a continued run learns from the same data.
        largest_token: the largest token id; -1 where there is no example.
        template: how rows have become texts, in words.
        tokens: the numbers of all examples, one behind the other, each with its ids first and then its labels.
    """

    def __init__(
        self, tokens: Tokens, lengths: np.ndarray, counts: Counts, digest: str, largest_token: int, template: str = ""
    ):
        self.lengths = lengths
        self.counts = counts
        self.digest = digest
        self.largest_token = largest_token
        self.template = template
        self.tokens = tokens
        self._ends = np.cumsum(lengths, dtype=np.int64)

    @classmethod
    def of(cls, examples: Iterable[Example], counts: Counts | None = None) -> "Examples":
        """Examples that are kept in memory.

        Args:
            counts: what has become of the rows; None: every example is a row.
        """
        given = list(examples)
        parts = [example[key] for example in given for key in ("input_ids", "labels")]
        tokens = np.concatenate([np.zeros(0, dtype=np.int32), *parts], dtype=np.int32)
        lengths = np.array([len(example["input_ids"]) for example in given], dtype=np.int32)
        learned = sum(int((example["labels"][1:] != IGNORED).sum()) for example in given)
        own = Counts(rows=len(given), learned_rows=len(given), tokens=int(lengths.sum()), learned_tokens=learned)
        return cls(tokens, lengths, counts or own, digest.of_bytes(tokens.tobytes()), int(tokens.max(initial=-1)))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        """The example at a place from 0; a negative one counts from the end.

        Raises:
            IndexError: there is no example at the place.
            ValueError: the file of tokens cannot be read.
        """
        length = int(self.lengths[index])
        end = 2 * int(self._ends[index])
        found = np.array(self.tokens[end - 2 * length : end])
        return {"input_ids": found[:length], "labels": found[length:]}

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


class TokenFile:
    """A file of int32 numbers, of which slices are read.

    It is read and not mapped: a mapped file that a network's disk no longer gives kills the process without a word.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("rb", buffering=0)

    def __getitem__(self, part: slice, /) -> np.ndarray:
        wanted = (part.stop - part.start) * _BYTES
        try:
            data = os.pread(self._file.fileno(), wanted, part.start * _BYTES)
        except OSError as error:
            raise ValueError(f"{self._path}: cannot be read ({error.strerror})") from error
        if len(data) != wanted:
            raise ValueError(f"{self._path}: is cut off; remove its folder, and it will be made again")
        return np.frombuffer(data, dtype=np.int32)


def store(folder: Path, parts: Iterable[Encoded], template: str) -> Counts:
    """Write examples into an empty folder as they come; returns what became of their rows.

    Args:
        template: how rows become texts, in words.
    """
    counts, largest = Counts(), -1
    lengths: list[np.ndarray] = []
    with (folder / _TOKENS).open("wb") as file:
        for part in parts:
            for example in part.examples:
                file.write(example["input_ids"].tobytes())
                file.write(example["labels"].tobytes())
                largest = max(largest, int(example["input_ids"].max()))
            lengths.append(np.array([len(example["labels"]) for example in part.examples], dtype=np.int32))
            counts += part.counts
    np.save(folder / _LENGTHS, np.concatenate([np.zeros(0, dtype=np.int32), *lengths]))
    facts = {
        "counts": counts.as_dict(),
        "digest": digest.of_file(folder / _TOKENS),
        "digest_of_lengths": digest.of_file(folder / _LENGTHS),
        "largest_token": largest,
        "template": template,
    }
    write_json(folder / _FACTS, facts)
    return counts


def opened(folder: Path, source: str) -> Examples:
    """The examples that a folder keeps.

    Args:
        source: where their rows come from, for the counts.

    Raises:
        ValueError: the folder cannot be read, or holds something else; the message says how to make it again.
    """
    with _or_damaged(folder):
        facts: dict[str, Any] = read_json(folder / _FACTS)
        lengths = np.load(folder / _LENGTHS)
        tokens = TokenFile(folder / _TOKENS)
        counts = replace(Counts(**facts["counts"]), source=source)
        return Examples(tokens, lengths, counts, facts["digest"], facts["largest_token"], facts["template"])


def check_stored(folder: Path) -> None:
    """Compare the files of stored examples with their digests, at the speed of the disk.

    Raises:
        ValueError: one of them is not what was written, or cannot be read; the message says how to make it again.
    """
    with _or_damaged(folder):
        facts = read_json(folder / _FACTS)
        wanted = {_TOKENS: facts["digest"], _LENGTHS: facts["digest_of_lengths"]}
        if changed := [name for name, value in wanted.items() if digest.of_file(folder / name) != value]:
            raise ValueError(f"{changed[0]} is not what was written")


@contextmanager
def _or_damaged(folder: Path) -> Iterator[None]:
    """A context in which whatever goes wrong is told as a damage of the folder."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        raise ValueError(
            f"{folder}: the tokens stored there are damaged ({why}); remove this folder, and they will be made again"
        ) from error
