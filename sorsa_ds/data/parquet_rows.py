"""The rows of Parquet files, with the types that the files' columns have."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
from datasets import Features, Value
from datasets.table import table_cast

from sorsa_ds.data.packed import opened
from sorsa_ds.runtime.console import say

_ROWS_AT_ONCE = 1000


def shared_features(files: Sequence[Path]) -> Features:
    """The columns of several files and their types.

    A column that some files lack is missing in their rows. Whole numbers and text make a column of text. A column whose
    types differ in another way, or that has a type of which no row can be made, is left out, which is said.

    Raises:
        ValueError: a file cannot be read, or has two columns of one name.
    """
    found: dict[str, object] = {}
    left_out, unreadable = set(), set()
    for file in files:
        kinds, strange = _kinds(file)
        unreadable |= strange
        for name, kind in kinds.items():
            shared = _shared(found[name], kind) if name in found else kind
            if shared is None:
                left_out.add(name)
            else:
                found[name] = shared
    if left_out:
        say(f"Columns whose types differ from file to file are left out: {', '.join(sorted(left_out))}")
    if unreadable:
        say(f"Columns whose types cannot be read are left out: {', '.join(sorted(unreadable))}")
    return Features({name: kind for name, kind in found.items() if name not in left_out | unreadable})


def parquet_batches(file: Path, features: Features) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a file, with all columns of `shared_features`.

    Raises:
        ValueError: the file cannot be read; the message names it.
    """
    schema = features.arrow_schema
    with opened(file) as stream:
        try:
            parquet = pyarrow.parquet.ParquetFile(stream)
            names = [name for name in schema.names if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=names):
                table = pyarrow.Table.from_batches([batch])
                for column in schema:
                    if column.name not in names:
                        table = table.append_column(column, pyarrow.nulls(len(table), column.type))
                table = table_cast(table.select(schema.names), schema)
                table.validate(full=True)  # text need not be UTF-8 in a file
                yield from table.to_batches()
        except (pyarrow.ArrowException, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error


def _schema(file: Path) -> pyarrow.Schema:
    with opened(file) as stream:
        try:
            return pyarrow.parquet.read_schema(stream)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file}: {error}") from error


def _kinds(file: Path) -> tuple[dict[str, object], set[str]]:
    """The types of a file's columns, and the columns whose type `datasets` does not know, such as a map."""
    schema = _schema(file)
    if repeated := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise ValueError(f"{file}: two columns have the name {repeated[0]!r}")
    kinds: dict[str, object] = {}
    for field in schema:
        with suppress(ValueError):
            kinds |= Features.from_arrow_schema(pyarrow.schema([field], metadata=schema.metadata))
    return kinds, set(schema.names) - kinds.keys()


def _shared(one: object, other: object) -> object | None:
    """The type that two columns of a name have in common; None where there is none."""
    if one == other:
        return one
    kinds = [kind.dtype for kind in (one, other) if isinstance(kind, Value)]
    if len(kinds) < 2:
        return next((kind for kind, null in ((one, other), (other, one)) if null == Value("null")), None)
    if "null" in kinds:
        return one if kinds[1] == "null" else other
    return Value("string") if all("string" in kind or "int" in kind for kind in kinds) else None
