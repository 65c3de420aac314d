"""The rows of CSV files. Every cell is the text that stands in it: `007`, `1.50`, `NA` and `TRUE` mean themselves."""

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sorsa_ds.data.packed import opened


def table_rows(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a file by the names in its first line. Lines that are blank count as no rows.

    Raises:
        ValueError: a row has more or fewer cells than the first line, two columns have one name, or the file cannot be
            read; the message names the file and the line.
    """
    csv.field_size_limit(sys.maxsize)  # a limit of the whole process, whose default is 128 KiB
    with opened(file) as stream:
        reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
        columns: list[str] = []
        try:
            for row in reader:
                if not row or (len(row) == 1 and row[0] and not row[0].strip()):
                    continue
                if not columns:
                    columns = row
                    if repeated := [name for name, count in Counter(columns).items() if count > 1]:
                        raise ValueError(f"{file}, line {reader.line_num}: two columns have the name {repeated[0]!r}")
                elif len(row) != len(columns):
                    raise ValueError(
                        f"{file}, line {reader.line_num}: {len(row)} cells, where the first line names "
                        f"{len(columns)} columns"
                    )
                else:
                    yield dict(zip(columns, row, strict=True))
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:  # text is decoded in blocks, before there are lines
            raise ValueError(f"{file}: {error}") from error
