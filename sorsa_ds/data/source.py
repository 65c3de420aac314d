"""The rows to train on and to hold out: from files, folders, the hub, or generated.

Every rank reads for itself. `datasets` converts a file once, under a file lock, into a cache that all ranks map, and
nothing here is random but the generated problems, which are seeded: all ranks get the same rows.
"""

import glob
import re
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset

from sorsa_ds.config.schema import EMBEDDED_DATA, DataConfig
from sorsa_ds.data.faults import JSON_SUFFIXES, find_fault
from sorsa_ds.data.word_problems import word_problems

BUILDERS = dict.fromkeys(JSON_SUFFIXES, "json") | {".parquet": "parquet", ".csv": "csv", ".csv.gz": "csv"}
"""Which reader of `datasets` opens a file, by its suffix."""

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Selection(NamedTuple):
    """Rows of a split: from `start` to `end`, which is left out."""

    split: str
    start: int
    end: int

    def overlaps(self, other: "Selection") -> bool:
        """Whether a row is in both."""
        return self.split == other.split and max(self.start, other.start) < min(self.end, other.end)


def load_rows(config: DataConfig, seed: int) -> tuple[Dataset, Dataset | None]:
    """(training rows, held-out rows or None), which have no row in common.

    Held out are at most `eval_size` rows: the first ones of `eval_path` / `eval_split` where either is set, else the
    last ones of the training rows. `seed` is that of the generated data.

    Raises:
        ValueError: the data cannot be found or read, a split does not exist or selects no row, training and held-out
            rows overlap, or none is left to train on.
    """
    splits = open_splits(config.path, config.name, seed)
    trained = select(splits, config.train_split, "data.train_split")
    train = take(splits, trained)
    if config.eval_size == 0:
        return train, None
    if config.eval_path is None and config.eval_split is None:
        kept = len(train) - config.eval_size
        if kept < 1:
            raise ValueError(
                f"data.eval_size: nothing is left to train on when {config.eval_size} of {len(train)} rows are held out"
            )
        return train.select(range(kept)), train.select(range(kept, len(train)))

    elsewhere = config.eval_path is not None and _place(config.eval_path) != _place(config.path)
    eval_splits = open_splits(config.eval_path, None, seed, "data.eval_path") if elsewhere else splits
    held_out = select(eval_splits, config.eval_split or _only_split(eval_splits), "data.eval_split")
    if not elsewhere and any(one.overlaps(other) for one in trained for other in held_out):
        raise ValueError(
            f"data.eval_split: {config.eval_split or 'the only split'} has rows in common with data.train_split "
            f"({config.train_split}), and the held-out loss would be one of rows learned"
        )
    rows = take(eval_splits, held_out)
    return train, rows.select(range(min(config.eval_size, len(rows))))


def open_splits(path: str, name: str | None, seed: int, setting: str = "data.path") -> DatasetDict:
    """All splits of a file (its only split is `train`), a folder, a data set on the hub, or the embedded data.

    `name`: configuration of a hub data set. `setting`: the one that errors name.

    Raises:
        ValueError: there is no such data, it is empty, or it cannot be read.
    """
    local = Path(path).expanduser()
    if path == EMBEDDED_DATA:
        return DatasetDict(train=word_problems(seed))
    if local.is_file():
        return _read(setting, local, _builder(setting, local), data_files={"train": glob.escape(str(local))})
    if local.is_dir():
        _check_folder(setting, local)
        return _read(setting, local, str(local))
    if _HUB_NAME.fullmatch(path) and _suffix(local) is None:
        return _read_hub(setting, path, name)
    raise ValueError(f"{setting}: no file or folder {path!r} here, and no name of a data set on the hub either")


def select(splits: DatasetDict, spec: str, setting: str) -> list[Selection]:
    """What a split with an optional slice stands for: `train`, `train[:1000]`, `train[90%:]`, `train+test`.

    Raises:
        ValueError: it is written wrongly, names a split that does not exist, or selects no row.
    """
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute(splits.num_rows)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    selected = [Selection(part.splitname, part.from_, part.to) for part in parts if part.from_ < part.to]
    if not selected:
        sizes = ", ".join(f"{split}: {rows}" for split, rows in splits.num_rows.items())
        raise ValueError(f"{setting}: {spec} selects no row; there are {sizes}")
    return selected


def take(splits: DatasetDict, selected: list[Selection]) -> Dataset:
    """The rows selected, one selection after the other."""
    return concatenate_datasets([splits[one.split].select(range(one.start, one.end)) for one in selected])


def _read(setting: str, local: Path, *arguments, **named) -> DatasetDict:
    try:
        splits = load_dataset(*arguments, **named)
        for rows in splits.values():
            rows.data.validate(full=True)  # text that is not UTF-8 passes the JSON reader
    except Exception as error:  # each reader has its own kinds, down to StopIteration for an empty file
        fault = find_fault(_data_files(local)) or f"{local}: {_reason(error)}"
        raise ValueError(f"{setting}: {fault}") from error
    return splits


def _read_hub(setting: str, path: str, name: str | None) -> DatasetDict:
    try:
        return load_dataset(path, name)
    except Exception as error:
        raise ValueError(
            f"{setting}: there is no file or folder {path!r} here, and reading it from the hub failed "
            f"(data.name: {name}): {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """What went wrong; `datasets` wraps it in an error that only says that something did."""
    return str(error.__cause__ or error).strip()


def _check_folder(setting: str, folder: Path) -> None:
    kinds = {BUILDERS[_suffix(file)] for file in _data_files(folder)}
    if len(kinds) != 1:
        found = f"mixes {', '.join(sorted(kinds))}" if kinds else "has no data file"
        raise ValueError(f"{setting}: the folder {folder} {found}; it takes files of one kind: {', '.join(BUILDERS)}")


def _builder(setting: str, file: Path) -> str:
    suffix = _suffix(file)
    if suffix is None:
        raise ValueError(f"{setting}: {file} is of no known kind ({', '.join(BUILDERS)})")
    return BUILDERS[suffix]


def _data_files(local: Path) -> list[Path]:
    return sorted(file for file in local.rglob("*") if _suffix(file)) if local.is_dir() else [local]


def _suffix(file: Path) -> str | None:
    return next((suffix for suffix in BUILDERS if file.name.endswith(suffix)), None)


def _place(path: str) -> Path:
    return Path(path).expanduser().resolve()


def _only_split(splits: DatasetDict) -> str:
    if len(splits) > 1:
        raise ValueError(f"data.eval_split: say which split of data.eval_path to hold out: {', '.join(splits)}")
    return next(iter(splits))
