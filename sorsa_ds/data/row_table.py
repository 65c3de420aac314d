"""Rows of any shape as one Arrow file that is mapped into memory.

A column is text where every cell of it is text or missing, and JSON where any is not, whatever the cells are: so files
may differ in their columns and types. A number that is a cell stays as it was written. Columns that come from Parquet
files keep the types that they have.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Features, Json, Value
from datasets.features.features import register_feature

from sorsa_ds.data.written_number import WrittenNumber

ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 1000, 2**24

Kinds = dict[str, bool]
"""Name of a column -> whether all of its cells are text or missing."""


@dataclass
class ExactJson(Json):
    """Cells of any kind, stored as JSON text.

    pandas' decoder, which `Json` and the `to_list` of a data set use, reads -0.7 as -0.7000000000000001; rows that are
    taken by their index, or one after the other, are decoded here.
    """

    _type: str = field(default="ExactJson", init=False, repr=False)

    def encode_example(self, example_data: Any) -> str | None:
        """The text that stands for a value."""
        return None if example_data is None else _as_json(example_data)

    def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
        """The value that a text stands for."""
        if example_data is None:
            return None
        value = json.loads(example_data)
        return WrittenNumber(example_data) if type(value) in (int, float) else value


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it calls itself experimental, whoever calls it
    register_feature(ExactJson, ExactJson.__name__)


class RowTable:
    """Writes rows into one Arrow file in a folder, batch by batch, and learns on the way which columns there are.

    Each time a column is new, or turns out not to be text, another file is begun. Where there are several in the end,
    they are copied into one whose columns are all of them.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._kinds: Kinds = {}
        self._parts: list[Path] = []
        self._writer: pyarrow.ipc.RecordBatchStreamWriter | None = None

    def add(self, file: Path, rows: Iterable[dict[str, Any]]) -> int:
        """Add the rows of a file, and return their number.

        Raises:
            ValueError: the rows cannot be read, or a cell holds what is no character; the message names file and row.
        """
        count = 0
        for batch in _batches(rows):
            kinds = dict(self._kinds)
            for row in batch:
                for name, cell in row.items():
                    kinds[name] = kinds.get(name, True) and (cell is None or _is_text(cell))
            if kinds != self._kinds or self._writer is None:
                self._begin(kinds)
            try:
                table = _table(batch, kinds)
            except (UnicodeEncodeError, pyarrow.ArrowInvalid):
                for number, row in enumerate(batch, count + 1):
                    _check_characters(file, number, row)
                raise
            assert self._writer is not None
            self._writer.write_batch(table)
            count += len(batch)
        return count

    def close(self, target: Path) -> None:
        """Put all rows into one file."""
        self._end()
        if len(self._parts) == 1:
            self._parts[0].rename(target)
            return
        schema = _features(self._kinds).arrow_schema
        with pyarrow.ipc.new_stream(str(target), schema) as writer:
            for part in self._parts:
                with pyarrow.memory_map(str(part)) as stream:
                    for batch in pyarrow.ipc.open_stream(stream):
                        writer.write_batch(_widened(batch, schema))
                part.unlink()

    def _begin(self, kinds: Kinds) -> None:
        self._end()
        self._kinds = kinds
        self._parts.append(self._folder / f"part-{len(self._parts)}.arrow")
        self._writer = pyarrow.ipc.new_stream(str(self._parts[-1]), _features(kinds).arrow_schema)

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _is_text(cell: Any) -> bool:
    return isinstance(cell, str) and not isinstance(cell, WrittenNumber)


def _as_json(cell: Any) -> str:
    return str(cell) if isinstance(cell, WrittenNumber) else json.dumps(cell, ensure_ascii=False)


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows by the thousand, or fewer where they are long."""
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(cell) for cell in row.values() if isinstance(cell, str | list | dict))
        if len(batch) == ROWS_AT_ONCE or size > CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _features(kinds: Kinds) -> Features:
    return Features({name: Value("string") if is_text else ExactJson() for name, is_text in kinds.items()})


def _table(rows: Sequence[dict[str, Any]], kinds: Kinds) -> pyarrow.RecordBatch:
    columns = [
        pyarrow.array([row.get(name) for row in rows], pyarrow.string())
        if is_text
        else _json_column([row.get(name) for row in rows])
        for name, is_text in kinds.items()
    ]
    return pyarrow.RecordBatch.from_arrays(columns, schema=_features(kinds).arrow_schema)


def _json_column(cells: Iterable[Any]) -> pyarrow.Array:
    texts = [None if cell is None else _as_json(cell) for cell in cells]
    return pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(texts, pyarrow.string()))


def _widened(batch: pyarrow.RecordBatch, schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    """A batch with all columns of a schema, in which a column of text may be one of JSON."""
    columns = []
    for column in schema:
        if column.name not in batch.schema.names:
            columns.append(pyarrow.nulls(batch.num_rows, column.type))
            continue
        cells = batch.column(column.name)
        columns.append(cells if cells.type == column.type else _json_column(cells.to_pylist()))
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema)


def _check_characters(file: Path, number: int, row: dict[str, Any]) -> None:
    """Stop at half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    for name, cell in row.items():
        try:
            name.encode()
            json.dumps(cell, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            shown = name.encode(errors="backslashreplace").decode()
            raise ValueError(
                f"{file}, row {number}: column {shown!r} holds something that is no character ({error.reason})"
            ) from error
