"""The rows to train on and to hold out: from files, folders, the hub, or generated.

Every rank reads for itself. `datasets` converts a file once, under a file lock, into a cache that all ranks map into
memory. Only the generated problems are random, and they are seeded, so all ranks get the same rows.
"""

import glob
import re
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset

from sorsa_ds.config.schema import EMBEDDED_DATA, DataConfig
from sorsa_ds.data.faults import JSON_SUFFIXES, find_fault, find_hidden_fault
from sorsa_ds.data.word_problems import word_problems

BUILDERS = dict.fromkeys(JSON_SUFFIXES, "json") | {".parquet": "parquet", ".csv": "csv", ".csv.gz": "csv"}
"""Which reader of `datasets` opens a file, by its suffix."""

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class RowRange(NamedTuple):
    """The rows [start, end) of a split."""

    split: str
    start: int
    end: int

    def overlaps(self, other: "RowRange") -> bool:
        """Whether some row is in both ranges."""
        return self.split == other.split and max(self.start, other.start) < min(self.end, other.end)


def load_rows(config: DataConfig, seed: int) -> tuple[Dataset, Dataset | None]:
    """Read the training rows, and the held-out rows or None; they have no row in common.

    At most `eval_size` rows are held out: the first ones of `eval_path` / `eval_split` where either is set, else the
    last ones of the training rows.

    Args:
        seed: of the generated data.

    Raises:
        ValueError: the data cannot be found or read, a split does not exist or selects no row, training and held-out
            rows overlap, or no row is left to train on.
    """
    splits = open_splits(config.path, config.name, seed)
    trained = resolve_split(splits, config.train_split, "data.train_split")
    train = take_rows(splits, trained)
    if config.eval_size == 0:
        return train, None
    if config.eval_path is None and config.eval_split is None:
        kept = len(train) - config.eval_size
        if kept < 1:
            raise ValueError(
                f"data.eval_size: nothing is left to train on when {config.eval_size} of {len(train)} rows are held out"
            )
        return train.select(range(kept)), train.select(range(kept, len(train)))

    eval_splits = splits
    if config.eval_path is not None and _absolute(config.eval_path) != _absolute(config.path):
        eval_splits = open_splits(config.eval_path, None, seed, "data.eval_path")
    held_out = resolve_split(eval_splits, config.eval_split or _only_split(eval_splits), "data.eval_split")
    if eval_splits is splits and any(one.overlaps(other) for one in trained for other in held_out):
        raise ValueError(
            f"data.eval_split: {config.eval_split or 'the only split'} has rows in common with data.train_split "
            f"({config.train_split}), so the held-out loss would be taken on rows that were learned"
        )
    rows = take_rows(eval_splits, held_out)
    return train, rows.select(range(min(config.eval_size, len(rows))))


def open_splits(path: str, name: str | None, seed: int, setting: str = "data.path") -> DatasetDict:
    """Open all splits of a file (its only split is `train`), a folder, a data set on the hub, or the embedded data.

    Args:
        name: configuration of a data set on the hub.
        seed: of the embedded data.
        setting: name of the setting that gave the path, for error messages.

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


def resolve_split(splits: DatasetDict, spec: str, setting: str) -> list[RowRange]:
    """The rows that a split with an optional slice means: `train`, `train[:1000]`, `train[90%:]`, `train+test`.

    Raises:
        ValueError: the split is written wrongly, does not exist, or selects no row.
    """
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute(splits.num_rows)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    selected = [RowRange(part.splitname, part.from_, part.to) for part in parts if part.from_ < part.to]
    if not selected:
        sizes = ", ".join(f"{split}: {rows}" for split, rows in splits.num_rows.items())
        raise ValueError(f"{setting}: {spec} selects no row; there are {sizes}")
    return selected


def take_rows(splits: DatasetDict, selected: list[RowRange]) -> Dataset:
    """The rows of some ranges, one range after the other."""
    return concatenate_datasets([splits[one.split].select(range(one.start, one.end)) for one in selected])


def _read(setting: str, local: Path, *arguments, **named) -> DatasetDict:
    if fault := find_hidden_fault(_data_files(local)):
        raise ValueError(f"{setting}: {fault}")
    try:
        splits = load_dataset(*arguments, **named)
        for rows in splits.values():
            rows.data.validate(full=True)  # because text that is not UTF-8 passes the JSON reader
    except Exception as error:  # each reader has its own kinds of error, even StopIteration for an empty file
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
    """What went wrong: `datasets` wraps the real error in one that only says that something went wrong."""
    return str(error.__cause__ or error).strip()


def _check_folder(setting: str, folder: Path) -> None:
    kinds = {BUILDERS[suffix] for file in _data_files(folder) if (suffix := _suffix(file))}
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


def _absolute(path: str) -> Path:
    return Path(path).expanduser().resolve()


def _only_split(splits: DatasetDict) -> str:
    if len(splits) > 1:
        raise ValueError(f"data.eval_split: say which split of data.eval_path to hold out: {', '.join(splits)}")
    return next(iter(splits))
