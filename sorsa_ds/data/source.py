"""The rows to train on and to hold out: from files, folders, the hub, or generated.

Every rank reads for itself. `datasets` converts a file once, under a file lock, into a cache that all ranks map into
memory. Only the generated problems are random, and they are seeded, so all ranks get the same rows.
"""

import glob
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    Json,
    LargeList,
    List,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
)
from datasets.data_files import _get_data_files_patterns, resolve_pattern
from datasets.features.features import require_decoding

from sorsa_ds.config.schema import EMBEDDED_DATA, DataConfig
from sorsa_ds.data.data_files import builder_of, check_data, files_of
from sorsa_ds.data.faults import find_fault, find_hidden_fault
from sorsa_ds.data.word_problems import word_problems
from sorsa_ds.runtime import hub
from sorsa_ds.runtime.console import say

# `datasets` would tell the hub of every file that is opened, to count what is used.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


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
        return _read(setting, local, {"train": [local]})
    if local.is_dir():
        return _read(setting, local, _splits_of(local, setting))
    check_data(path, setting)
    return _read_hub(setting, path, name)


def open_stream(path: str, name: str | None, split: str | None, setting: str = "data.path") -> IterableDataset:
    """Open a split of a file, a folder or a data set on the hub, of which rows are read only as they are asked for.

    Args:
        name: configuration of a data set on the hub.
        split: name of the split, without a slice; None: the only one.
        setting: name of the setting that gave the path, for error messages.

    Raises:
        ValueError: there is no such data or split, or it cannot be opened.
    """
    local = Path(path).expanduser()
    try:
        if local.exists():
            files = _splits_of(local, setting) if local.is_dir() else {"train": [local]}
            named = {part: [glob.escape(str(file)) for file in those] for part, those in files.items()}
            splits = load_dataset(builder_of(local, setting), data_files=named, streaming=True)
        else:
            check_data(path, setting)
            hub.can_be_read("dataset", path, "README.md", needed=True)
            splits = load_dataset(path, name, streaming=True)
    except Exception as error:
        raise ValueError(f"{setting}: {path} cannot be opened as a stream: {_reason(error)}") from error
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise ValueError(f"{setting}: there is no split {split} in {path}; say which to take: {', '.join(splits)}")
    rows = splits[split]
    media = [column for column, kind in (rows.features or {}).items() if _opens_files(kind)]
    return rows.remove_columns(media) if media else rows


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


def _read(setting: str, local: Path, files: dict[str, list[Path]]) -> DatasetDict:
    """Read the files of each split, and nothing that a file beside them names."""
    builder = builder_of(local, setting)
    named = {split: [glob.escape(str(file)) for file in those] for split, those in files.items()}
    if fault := find_hidden_fault(file for those in files.values() for file in those):
        raise ValueError(f"{setting}: {fault}")
    try:
        splits = load_dataset(builder, data_files=named)
        for rows in splits.values():
            rows.data.validate(full=True)  # because text that is not UTF-8 passes the JSON reader
    except Exception as error:  # each reader has its own kinds of error, even StopIteration for an empty file
        fault = find_fault(files_of(local)) or f"{local}: {_reason(error)}"
        raise ValueError(f"{setting}: {fault}") from error
    return _without_media(splits)


def _splits_of(folder: Path, setting: str) -> dict[str, list[Path]]:
    """The files of each split of a folder, by the names that `datasets` knows: `train.jsonl`, `test/a.csv`, and so on.

    A README.md is not asked: what it says could name files elsewhere, or on other machines.

    Raises:
        ValueError: the folder's files are not of one kind.
    """
    builder_of(folder, setting)
    root = folder.resolve()
    ours = {str(file) for file in files_of(root)}

    def matching(pattern: str) -> list[str]:
        found = [file for file in resolve_pattern(pattern, glob.escape(str(root))) if file in ours]
        if not found:
            raise FileNotFoundError(pattern)
        return found

    splits: dict[str, list[Path]] = {}
    for split, patterns in _get_data_files_patterns(matching).items():
        for pattern in patterns:
            with suppress(FileNotFoundError):
                splits.setdefault(str(split), []).extend(map(Path, matching(pattern)))
    return splits


@contextmanager
def _from_cache() -> Iterator[None]:
    """A context in which `datasets` takes what is in its cache, and does not ask the hub again and again."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _without_media(splits: DatasetDict) -> DatasetDict:
    """The splits without columns of pictures or sound: reading a row would open what they name, files or addresses."""
    for split, rows in splits.items():
        media = [name for name, kind in rows.features.items() if _opens_files(kind)]
        if media:
            say(f"Columns of pictures or sound are left out of {split}: {', '.join(media)}")
            splits[split] = rows.remove_columns(media)
    return splits


def _opens_files(kind: Any) -> bool:
    """Whether values of a kind of column name files that reading them would open. Values of several types name none."""
    if isinstance(kind, dict):
        return any(_opens_files(inner) for inner in kind.values())
    if isinstance(kind, List | LargeList):
        return _opens_files(kind.feature)
    return require_decoding(kind) and not isinstance(kind, Json)


def _read_hub(setting: str, path: str, name: str | None) -> DatasetDict:
    online = True
    try:
        online = hub.can_be_read("dataset", path, "README.md")
        with nullcontext() if online else _from_cache():
            return _without_media(load_dataset(path, name))
    except Exception as error:
        raise ValueError(
            f"{setting}: there is no file or folder {path!r} here, and reading it from the hub failed "
            f"(data.name: {name}): {_reason(error) if online else hub.unreachable(setting)}"
        ) from error


def _reason(error: Exception) -> str:
    """What went wrong: `datasets` wraps the real error in one that only says that something went wrong."""
    return str(error.__cause__ or error).strip()


def _absolute(path: str) -> Path:
    return Path(path).expanduser().resolve()


def _only_split(splits: DatasetDict) -> str:
    if len(splits) > 1:
        raise ValueError(f"data.eval_split: say which split of data.eval_path to hold out: {', '.join(splits)}")
    return next(iter(splits))
