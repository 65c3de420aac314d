"""Rows that are chosen out of the splits of a data set, and where each of them stands."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, ReadInstruction, concatenate_datasets

from sorsa_ds.data.stored_rows import Part


class RowRange(NamedTuple):
    """The rows [start, end) of a split, or of another set of rows that has a name."""

    split: str
    start: int
    end: int

    def overlaps(self, other: "RowRange") -> bool:
        """Whether some row is in both ranges."""
        return self.split == other.split and max(self.start, other.start) < min(self.end, other.end)


@dataclass(frozen=True, slots=True)
class Splits:
    """The splits of a data set.

    path: where the data set is, as the settings have it.
    name: `data.name`, which names one of several data sets there; None where it is not given.
    rows: the rows of each split, by its name.
    parts: the files that the rows are from; empty where they are from no file here.
    """

    path: str
    name: str | None
    rows: Mapping[str, Dataset]
    parts: Sequence[Part] = ()


@dataclass(frozen=True, slots=True)
class Selected:
    """The rows of some ranges, one range after the other."""

    splits: Splits
    ranges: Sequence[RowRange]

    def __len__(self) -> int:
        return sum(one.end - one.start for one in self.ranges)

    def rows(self) -> Dataset:
        """The rows themselves."""
        return concatenate_datasets([self.splits.rows[one.split].select(range(*one[1:])) for one in self.ranges])

    def part(self, start: int, end: int) -> "Selected":
        """The rows [start, end) of these."""
        found, before = [], 0
        for one in self.ranges:
            first, last = (min(max(one.start + place - before, one.start), one.end) for place in (start, end))
            found += [RowRange(one.split, first, last)] if first < last else []
            before += one.end - one.start
        return Selected(self.splits, found)

    def place(self, number: int) -> str:
        """Where a row stands, as `FILE, row 3`, with rows from 1; empty where its number alone says it.

        Args:
            number: the row's number, from 0, among the selected rows.
        """
        [one] = self.part(number, number + 1).ranges
        if not self.splits.parts:
            return f"split {one.split}, row {one.start + 1}"
        [(file, start, _)] = self._of_files([one])
        alone = Path(file) == Path(self.splits.path).expanduser() and start == number
        return "" if alone else f"{file}, row {start + 1}"

    def places(self) -> list[RowRange]:
        """The ranges by what holds the rows, whichever path leads there: files, or splits of a data set on the hub."""
        if self.splits.parts:
            return [RowRange(str(Path(file).resolve()), *rows) for file, *rows in self._of_files(self.ranges)]
        owner = self.splits.path if self.splits.name is None else f"{self.splits.path}, {self.splits.name}"
        return [RowRange(f"{owner}, split {one.split}", one.start, one.end) for one in self.ranges]

    def _of_files(self, ranges: Sequence[RowRange]) -> Iterator[tuple[str, int, int]]:
        """The files that ranges reach into, each with the range of its own rows."""
        for one in ranges:
            before = 0
            for part in self.splits.parts:
                if part.split != one.split:
                    continue
                start, end = max(one.start - before, 0), min(one.end - before, part.rows)
                if start < end:
                    yield str(part.file), start, end
                before += part.rows


def resolve_split(splits: Splits, spec: str, setting: str) -> Selected:
    """The rows that a split with an optional slice means: `train`, `train[:1000]`, `train[90%:]`, `train+test`.

    Raises:
        ValueError: the split is written wrongly, does not exist, or selects no row.
    """
    sizes = {split: len(rows) for split, rows in splits.rows.items()}
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute(sizes)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    selected = [RowRange(part.splitname, part.from_, part.to) for part in parts if part.from_ < part.to]
    if not selected:
        there = ", ".join(f"{split}: {rows}" for split, rows in sizes.items())
        raise ValueError(f"{setting}: {spec} selects no row; there are {there}")
    return Selected(splits, selected)


def overlap(learned: Sequence[RowRange], held_out: Sequence[RowRange]) -> str:
    """What holds rows that are both learned and held out; empty where nothing does."""
    return next((one.split for one in held_out if any(one.overlaps(other) for other in learned)), "")
