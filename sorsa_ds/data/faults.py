"""Why data files cannot be read, in terms of their lines, and what would be read wrongly without an error."""

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sorsa_ds.runtime.json_text import parse_json

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
TABLE_SUFFIXES = (".csv", ".csv.gz")


def find_fault(files: Iterable[Path]) -> str | None:
    """Say the first fault that is found, as `FILE is empty` or `FILE, line N: REASON`; None if there is none.

    It is asked only after reading the files has failed. Of files that are not JSON only the size is looked at.
    """
    for file in files:
        if file.stat().st_size == 0:
            return f"{file} is empty"
        if file.name.endswith(JSON_SUFFIXES):
            for fault in _json_faults(file):
                return f"{file}{fault}"
    return None


def find_hidden_fault(files: Iterable[Path]) -> str | None:
    """Say the first fault that reading would not tell, in the words of `find_fault`. It is asked before reading.

    - A row of a CSV file that has more or fewer cells than the first line: pandas would take the first cells of longer
      rows for row numbers, so that every column moves by one, and would fill up shorter rows.
    - A row of a JSON file that is `null`: PyArrow 26 ends the process with a segmentation fault if it is the first.
    """
    csv.field_size_limit(sys.maxsize)  # a limit of the whole process, whose default is 128 KiB
    for file in files:
        search = _null_faults if file.name.endswith(JSON_SUFFIXES) else _row_faults
        if not file.name.endswith((*JSON_SUFFIXES, *TABLE_SUFFIXES)):
            continue
        try:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
                for fault in search(stream):
                    return f"{file}{fault}"
        except (OSError, EOFError) as error:  # what a damaged .gz raises
            return f"{file}, cannot be unpacked: {error}"
    return None


def _null_faults(stream: Any) -> Iterator[str]:
    """Rows of a JSON file that are null: lines, or the first element where the file is an array."""
    for number, line in enumerate(stream, 1):
        start = line.lstrip(b"\xef\xbb\xbf \t\r\n")
        if number == 1 and start.startswith(b"["):
            start = start[1:].lstrip() or next(stream, b"").lstrip()
            if start.startswith(b"null"):
                yield ", element 1: null where an object with named columns is needed"
            return
        if start.startswith(b"null"):
            yield f", line {number}: null where an object with named columns is needed"


def _row_faults(stream: Any) -> Iterator[str]:
    """What is wrong with the rows of a CSV file. Lines that are blank count as no rows, as for pandas."""
    reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
    columns = 0
    try:
        for row in reader:
            if not row or (len(row) == 1 and not row[0].strip()):
                continue
            columns = columns or len(row)
            if len(row) != columns:
                yield f", line {reader.line_num}: {len(row)} cells, where the first line names {columns} columns"
    except csv.Error as error:
        yield f", line {reader.line_num}: {error}"
    except UnicodeDecodeError as error:  # text is decoded in blocks, before there are lines
        yield f": {error}"


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
