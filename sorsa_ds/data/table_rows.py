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

    Several columns without a name, as spreadsheets leave them behind the last one, are no columns if they are empty.

    Raises:
        ValueError: a row has more or fewer cells than the first line, two columns have one name, a cell stands in one
            of several columns without a name, or the file cannot be read; the message names the file and the line.
    """
    csv.field_size_limit(sys.maxsize)  # a limit of the whole process, whose default is 128 KiB
    with opened(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter="\t" if ".tsv" in file.name.lower() else ",", strict=True)
        columns: list[str] = []
        unnamed: list[int] = []
        try:
            for row in reader:
                if not row or (len(row) == 1 and row[0] and not row[0].strip()):
                    continue
                if not columns:
                    columns = row
                    unnamed = [place for place, name in enumerate(columns) if not name]
                    unnamed = unnamed if len(unnamed) > 1 else []
                    if repeated := [name for name, count in Counter(columns).items() if name and count > 1]:
                        raise ValueError(f"{file}, line {reader.line_num}: two columns have the name {repeated[0]!r}")
                elif len(row) != len(columns):
                    raise ValueError(
                        f"{file}, line {reader.line_num}: {len(row)} cells, where the first line names "
                        f"{len(columns)} columns"
                    )
                elif filled := [place for place in unnamed if row[place].strip()]:
                    raise ValueError(
                        f"{file}, line {reader.line_num}: cell {filled[0] + 1} stands in a column without a name"
                    )
                else:
                    cells = dict(zip(columns, row, strict=True))
                    if unnamed:
                        del cells[""]
                    yield cells
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:  # text is decoded in blocks, before there are lines
            raise ValueError(f"{file}: {error}") from error
