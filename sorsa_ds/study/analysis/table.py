"""The table of an analysis: one row per run, step and linear, in a CSV file that grows row by row."""

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sorsa_ds.model.module_names import kind_of
from sorsa_ds.runtime.files import write_text


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """What a row describes. block: the first number in the linear's name, -1 where it has none."""

    run: str
    block: int
    linear: str
    step: int


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of `measures`. Those of U and V are for SORSA's factors, and None for other methods."""

    delta_sigma: float
    delta_d: float
    delta_d_matched: float
    delta_d_clustered: float
    delta_d_subspace: float
    swapping: float
    condition_w: float
    condition_u: float | None
    condition_v: float | None
    orthonormality_u: float | None
    orthonormality_v: float | None
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table."""

    key: Key
    figures: Figures

    @property
    def kind(self) -> str:
        """The last part of the linear's name, as in `q_proj`; the number of an expert is skipped."""
        return kind_of(self.key.linear)


COLUMNS = [field.name for part in (Key, Figures) for field in fields(part)]


def block_of(linear: str) -> int:
    """The number of the block that a linear is in, taken from its name; -1 where the name has no number."""
    return next((int(part) for part in linear.split(".") if part.isdecimal()), -1)


class Table:
    """A CSV file of rows. The rows in it stay when it is opened, except for a last line that was cut by a kill.

    Raises:
        ValueError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[Key, Row] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        for line in csv.DictReader(io.StringIO(whole)):
            try:
                row = _row(line)
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"{path}: not a table of this program: {line}; remove it") from error
            self.rows[row.key] = row
        if not whole or whole != text:
            write_text(path, _text(self.rows.values()))

    def append(self, row: Row) -> None:
        """Add a row, which is on the disk when this returns.

        Raises:
            ValueError: the row cannot be written, for instance because the disk is full.
        """
        self.rows[row.key] = row
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(_cells(row))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            why = f"cannot be written ({error.strerror})"
            raise ValueError(f"{self.path}: {why}; the same command goes on with the rows that are there") from error

    def sort(self) -> None:
        """Sort the rows by run, block, linear and step, and write them."""
        self.rows = dict(sorted(self.rows.items()))
        write_text(self.path, _text(self.rows.values()))


def _text(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(map(_cells, rows))
    return text.getvalue()


def _cells(row: Row) -> list:
    return [*asdict(row.key).values(), *asdict(row.figures).values()]


def _row(line: dict[str, str]) -> Row:
    key = Key(line["run"], int(line["block"]), line["linear"], int(line["step"]))
    values: dict[str, Any] = {f.name: float(line[f.name]) if line[f.name] else None for f in fields(Figures)}
    return Row(key, Figures(**values))
