"""The questions: rows of a file, a folder, or a data set on the hub, in the layouts in which they were published."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from datasets import Dataset, DatasetDict

from sorsa_ds.data.source import open_splits
from sorsa_ds.runtime.json_text import parse_json
from sorsa_ds.runtime.words import cut

DATA_OPTION = "--data"
_SEED = 0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the data.

    number: the row's number from 1, as messages count.
    cells: column -> value: a text in the columns that a task needs, as stored in the others.
    """

    number: int
    cells: dict[str, Any]

    @contextmanager
    def named(self) -> Iterator[None]:
        """A context in which an error about the row tells its number."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{DATA_OPTION}: row {self.number}: {error}") from error


def open_data(data: str, config: str | None = None, columns: Mapping[str, str] = MappingProxyType({})) -> DatasetDict:
    """All splits of a file, a folder or a data set on the hub.

    Args:
        config: configuration of a hub data set; of a folder that is a copy of one, its folder of that name.
        columns: names that a task uses -> the names that its columns have in the data.

    Raises:
        ValueError: there is no such data, it cannot be read, or a column is missing.
    """
    local = Path(data).expanduser()
    if local.exists() and not (config and (local / config).is_dir()):
        config = None
    splits = open_splits(data, config, 0, DATA_OPTION)
    for split, rows in splits.items():
        for name, column in columns.items():
            if column not in rows.column_names:
                raise ValueError(f"--columns: {name} is to be {column!r}; {split} has {', '.join(rows.column_names)}")
        taken = [name for name in columns if name in rows.column_names and name not in columns.values()]
        rows = rows.remove_columns(taken)
        splits[split] = rows.rename_columns({column: name for name, column in columns.items() if column != name})
    return splits


def rows_of(splits: DatasetDict, names: Sequence[str], columns: Iterable[str]) -> Dataset:
    """The rows of the first of the named splits that the data has, or of its only split.

    Raises:
        ValueError: there is no such split, or one of `columns` is missing.
    """
    chosen = next((name for name in names if name in splits), next(iter(splits)) if len(splits) == 1 else None)
    if chosen is None:
        raise ValueError(f"{DATA_OPTION}: no split {' or '.join(names)}; there are {', '.join(splits)}")
    rows = splits[chosen]
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(
            f"{DATA_OPTION}: the rows have no column {', '.join(missing)}; they have {', '.join(rows.column_names)}"
        )
    return rows


def shots_of(splits: DatasetDict, names: Sequence[str], columns: Iterable[str], count: int) -> list[dict]:
    """The first `count` rows of the split that few-shot examples come from; no rows where none are wanted.

    Raises:
        ValueError: there is no such split, or it has fewer rows.
    """
    if count == 0:
        return []
    present = [name for name in names if name in splits]
    if not present:
        raise ValueError(
            f"--num_few_shot: the data has no split {' or '.join(names)} to take examples from (there are "
            f"{', '.join(splits)}); name a folder that has, or ask for 0"
        )
    rows, _ = complete_rows(rows_of(splits, present, columns), columns)
    if len(rows) < count:
        raise ValueError(f"--num_few_shot: {count} examples are wanted, the split {present[0]} has {len(rows)}")
    return [row.cells for row in rows[:count]]


def complete_rows(rows: Iterable[dict], columns: Iterable[str]) -> tuple[list[Row], list[str]]:
    """The rows that have text in some columns, and a sentence on those where one is null, if there are any.

    A whole number stands for its digits.

    Raises:
        ValueError: a column holds anything else; the message names the row.
    """
    columns = list(columns)
    complete = []
    missing: list[int] = []
    for number, cells in enumerate(rows, 1):
        if any(cells[column] is None for column in columns):
            missing.append(number)
            continue
        row = Row(number, dict(cells))
        for column in columns:
            value = cells[column]
            with row.named():
                if isinstance(value, bool) or not isinstance(value, str | int):
                    raise ValueError(f"column {column!r} holds {cut(repr(value))} where text is needed")
            row.cells[column] = str(value)
        complete.append(row)
    if not missing:
        return complete, []
    listed = ", ".join(map(str, missing[:10])) + (" and more" if len(missing) > 10 else "")
    return complete, [
        f"{len(missing)} of {len(complete) + len(missing)} rows are left out, since {' or '.join(columns)} is null: "
        f"row {listed}."
    ]


def first_rows(rows: Dataset, limit: int | None) -> list[dict]:
    """The first `limit` rows, or all rows where `limit` is None."""
    return [dict(row) for row in rows.select(range(len(rows) if limit is None else min(limit, len(rows))))]


def drawn_evenly(items: Sequence[T], limit: int | None, subject_of: Callable[[T], str]) -> list[T]:
    """So many items of a list that goes from subject to subject, in the order of the list; all where `limit` is None.

    Of each subject there are as many as of any other, or one more, as long as it has so many. They are drawn with a
    fixed seed, and a smaller limit draws a part of what a larger one draws. Of a single subject the first are taken.
    """
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(subject_of(item), []).append(place)
    subjects = list(places.values())
    if len(subjects) > 1:
        drawing = random.Random(_SEED)
        drawing.shuffle(subjects)
        for subject in subjects:
            drawing.shuffle(subject)
    turns = (place for place in chain.from_iterable(zip_longest(*subjects)) if place is not None)
    return [items[place] for place in sorted(islice(turns, limit))]


def read_json(file: Path) -> dict:
    """A row that is stored as a JSON file of its own.

    Raises:
        ValueError: the file holds no JSON object; the message names the file.
    """
    try:
        row = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{DATA_OPTION}: {file}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{DATA_OPTION}: {file}: {type(row).__name__} where an object with named fields is needed")
    return row
