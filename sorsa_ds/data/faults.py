"""Why data files cannot be read, in terms of their lines. It is asked only after reading them has failed."""

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from sorsa_ds.runtime.json_text import parse_json

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def find_fault(files: Iterable[Path]) -> str | None:
    """Say the first fault that is found, as `FILE is empty` or `FILE, line N: REASON`; None if there is none.

    Of files that are not JSON only the size is looked at.
    """
    for file in files:
        if file.stat().st_size == 0:
            return f"{file} is empty"
        if file.name.endswith(JSON_SUFFIXES):
            for fault in _json_faults(file):
                return f"{file}{fault}"
    return None


def _json_faults(file: Path) -> Iterator[str]:
    """What is wrong with a JSON file. One that starts with `[` is an array, any other holds one object per line."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
        try:
            is_array = stream.read(64).lstrip().startswith(b"[")
            stream.seek(0)
            yield from _array_faults(stream.read()) if is_array else _line_faults(stream)
        except (OSError, EOFError) as error:  # what a damaged .gz raises
            yield f", cannot be unpacked: {error}"


def _line_faults(lines: Iterable[bytes]) -> Iterator[str]:
    rows = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        rows += 1
        try:
            row = parse_json(line.decode("utf-8-sig"))
        except ValueError as error:
            yield f", line {number}: {error}"
        else:
            if not isinstance(row, dict):
                yield f", line {number}: {type(row).__name__} where an object with named columns is needed"
    if not rows:
        yield " is empty"


def _array_faults(content: bytes) -> Iterator[str]:
    try:
        rows = parse_json(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        yield f", line {error.lineno}: {error.msg}"
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield f", line {line}: {error}"
    except ValueError as error:
        yield f": {error}"
    else:
        if not rows:
            yield " is empty"
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                yield f", element {number}: {type(row).__name__} where an object with named columns is needed"
