"""The rows of JSON files: one object per line, an array of objects, or one object that is a row alone.

A number in a column is taken as it is written, `1.50` or `1e5`, since a column may be needed as text. What stands
deeper, in lists and objects, is read as the values that JSON means.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sorsa_ds.data.packed import opened
from sorsa_ds.data.written_number import WrittenNumber
from sorsa_ds.runtime.json_text import check_depth, strict_decoder

Row = dict[str, Any]

_VALUES = strict_decoder(nan=True)
_AS_WRITTEN = strict_decoder(number=str, nan=True)
_BLANKS = " \t\r\n"
_BLANK = re.compile(f"[{_BLANKS}]*")
_CHUNK = 2**22
_NEAR = 100
"""Characters before the end of what has been read within which an error may only mean that the rest is missing."""


def json_rows(file: Path) -> Iterator[Row]:
    """The rows of a file, of which no more than a few are in memory at a time.

    Raises:
        ValueError: a row is no JSON object, or the file cannot be read; the message names the file and the line.
    """
    with opened(file) as stream:
        start = stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()
        yield from _array(file, stream) if start.startswith(b"[") else _lines(file, stream)


def is_one_object(file: Path, most: int = 2**26) -> bool:
    """Whether a file holds one JSON object over several lines, as descriptions do, and files of many rows do not.

    Args:
        most: bytes of the largest file that is looked at as a whole.
    """
    try:
        with opened(file) as stream:
            first = stream.readline(most)
            if not first.lstrip(codecs.BOM_UTF8).lstrip().startswith(b"{") or file.stat().st_size > most:
                return False
            try:
                json.loads(first.decode("utf-8-sig"))
            except ValueError:
                return isinstance(json.loads((first + stream.read()).decode("utf-8-sig")), dict)
    except (OSError, EOFError, ValueError, RecursionError):
        pass  # whatever is wrong with the file is said when its rows are read
    return False


def _lines(file: Path, stream: BinaryIO) -> Iterator[Row]:
    """One row per line; or the only row, where the first line alone is not the whole of an object."""
    first = True
    for number, line in enumerate(stream, 1):
        if not line.strip(codecs.BOM_UTF8 + _BLANKS.encode()):
            continue
        try:
            yield _row(line.decode("utf-8-sig"))
        except ValueError as error:
            if first and isinstance(error, json.JSONDecodeError):
                yield _only_row(file, line + stream.read(), number, error)
                return
            raise ValueError(f"{file}, line {number}: {error}") from error
        first = False


def _only_row(file: Path, content: bytes, number: int, error: json.JSONDecodeError) -> Row:
    """The row that a file consists of, written over several lines.

    Args:
        number: the number of the first line that is not blank, from 1.
        error: what is wrong with that line, if it was meant to be a row.
    """
    try:
        return _row(content.decode("utf-8-sig"))
    except json.JSONDecodeError as whole:
        if content.partition(b"\n")[0].strip(codecs.BOM_UTF8 + _BLANKS.encode()) == b"{":
            raise ValueError(f"{file}, line {number + whole.lineno - 1}: {whole.msg}") from whole
    except ValueError:
        pass
    raise ValueError(f"{file}, line {number}: {error}") from error


def _row(text: str) -> Row:
    """The row that a text stands for.

    Raises:
        ValueError: the text does not stand for an object with named columns.
    """
    if text.lstrip(_BLANKS).startswith("null"):
        raise ValueError("null where an object with named columns is needed")
    return _checked(_decoded(text), text)


def _decoded(text: str) -> Any:
    try:
        return _VALUES.decode(text)
    except RecursionError:
        raise ValueError("too many lists and objects are inside one another") from None


def _checked(value: Any, text: str) -> Row:
    """A row whose numbers are put back to how its text writes them."""
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(f"{kind} where an object with named columns is needed")
    numbers = [name for name, cell in value.items() if type(cell) in (int, float)]
    if numbers:
        written = _AS_WRITTEN.decode(text)
        for name in numbers:
            value[name] = WrittenNumber(written[name])
    for cell in value.values():
        if isinstance(cell, list | dict):
            check_depth(cell)
    return value


class _Window:
    """The part of a file that is being looked at. What lies before is forgotten, and more is read when it is needed.

    Attributes: `text` and `at`, the place in it up to which all is read; `ended`, whether the file ends with it.
    """

    def __init__(self, file: Path, stream: BinaryIO):
        self._file, self._stream = file, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._lines = 0
        self.text, self.at, self.ended = "", 0, False

    def fault(self, reason: object, place: int | None = None) -> ValueError:
        """What is wrong at a place in the text, by default where one is."""
        line = self._lines + self.text.count("\n", 0, self.at if place is None else place) + 1
        return ValueError(f"{self._file}, line {line}: {reason}")

    def next(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            found = _BLANK.match(self.text, self.at)
            assert found is not None, "a pattern that may be empty matches everywhere"
            self.at = found.end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def value(self) -> tuple[Any, str]:
        """The value that begins here, and how it is written."""
        while True:
            try:
                value, end = _VALUES.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                partial = len(self.text) - error.pos < _NEAR or error.msg.startswith("Unterminated string")
                if self.ended or not partial:
                    raise self.fault(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.fault(error) from error
            else:
                if end < len(self.text) or self.ended:
                    start, self.at = self.at, end
                    return value, self.text[start:end]
            self._more()

    def _more(self) -> None:
        """Read as much again as there is, so that a long row is not tried too often."""
        self._lines += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        read = self._stream.read(max(_CHUNK, len(self.text)))
        try:
            self.text += self._decoder.decode(read, final=not read)
        except UnicodeDecodeError as error:
            line = self._lines + self.text.count("\n") + error.object.count(b"\n", 0, error.start) + 1
            raise ValueError(f"{self._file}, line {line}: {error}") from error
        self.ended = not read


def _array(file: Path, stream: BinaryIO) -> Iterator[Row]:
    """The rows of an array."""
    window = _Window(file, stream)
    assert window.next() == "["
    window.at += 1
    number = 0
    if window.next() == "]":
        window.at += 1
    else:
        while True:
            number += 1
            window.next()
            value, written = window.value()
            try:
                row = _checked(value, written)
            except ValueError as error:
                raise ValueError(f"{file}, element {number}: {error}") from error
            yield row
            sign = window.next()
            if sign not in (",", "]"):
                raise window.fault("Expecting ',' delimiter")
            window.at += 1
            if sign == "]":
                break
    if window.next():
        raise window.fault("Extra data behind the array")
