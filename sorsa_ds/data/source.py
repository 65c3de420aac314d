"""The rows to train on and to hold out: from files, folders, the hub, or generated.

Every rank reads for itself. Files are converted once, under a file lock, into a cache that all ranks map into memory.
Only the generated problems are random, and they are seeded, so all ranks get the same rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Json,
    LargeList,
    List,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
)
from datasets.features.features import require_decoding

from sorsa_ds.config.schema import EMBEDDED_DATA, DataConfig
from sorsa_ds.data.conversations import MEDIA
from sorsa_ds.data.data_files import check_data, data_files, is_description, is_saved, named_folder
from sorsa_ds.data.saved_rows import read_saved
from sorsa_ds.data.split_names import splits_of
from sorsa_ds.data.stored_rows import Part, read_files
from sorsa_ds.data.word_problems import word_problems
from sorsa_ds.runtime import hub
from sorsa_ds.runtime.console import say

# `datasets` would tell the hub of every file that is opened, to count what is used.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

_LISTED = 10
"""The most files of a split that are told by name."""


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

    Of a folder it says which files it is, and how many rows each has.

    Args:
        name: of a data set in the folder, or configuration of one on the hub.
        seed: of the embedded data.
        setting: name of the setting that gave the path, for error messages.

    Raises:
        ValueError: there is no such data, it is empty, or it cannot be read.
    """
    local = Path(path).expanduser()
    if path == EMBEDDED_DATA:
        return DatasetDict(train=word_problems(seed))
    if not local.exists():
        check_data(path, setting)
        return _read_hub(setting, path, name)
    splits, parts = _read(named_folder(local, name, setting), setting)
    if local.is_dir():
        for line in _told(local, parts):
            say(f"{setting}: {line}")
    return splits


def place_of_row(config: DataConfig, number: int, held_out: bool = False) -> str:
    """Where a row of `load_rows` stands in a folder, as `FILE, row 3`, with rows of a file from 1; else empty.

    Args:
        number: of the row, from 0, among those to train on or those held out.

    Raises:
        ValueError: the data cannot be read.
    """
    elsewhere = held_out and config.eval_path is not None
    path, name = (config.eval_path or "", None) if elsewhere else (config.path, config.name)
    local = Path(path).expanduser()
    if not local.is_dir():
        return ""
    splits, parts = _read(named_folder(local, name, "data.path"), "data.path")
    own = held_out and (elsewhere or config.eval_split is not None)
    spec = (config.eval_split or next(iter(splits))) if own else config.train_split
    ranges = resolve_split(splits, spec, "data.path")
    if held_out and not own:
        number += sum(one.end - one.start for one in ranges) - config.eval_size
    for one in ranges:
        if number < one.end - one.start:
            return _place(parts, one.split, one.start + number)
        number -= one.end - one.start
    raise AssertionError("the number is that of a row")


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


def _read(local: Path, setting: str) -> tuple[DatasetDict, list[Part]]:
    """Read a file or a folder, and nothing that a file in it names: a README.md is not asked.

    Raises:
        ValueError: a file cannot be read, or it is not clear which of them are meant.
    """
    if is_saved(local):
        splits, parts = read_saved(local, setting)
    else:
        files = data_files(local, setting)
        try:
            splits, parts = read_files(splits_of(local, files) if local.is_dir() else {"train": files})
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error
    return _without_media(splits, setting), parts


def _told(folder: Path, parts: Sequence[Part]) -> Iterator[str]:
    """What was read of a folder: rows of each split, with the files that they are from."""
    for split in dict.fromkeys(part.split for part in parts):
        own = [part for part in parts if part.split == split]
        listed = [f"{part.file.relative_to(folder)} ({part.rows})" for part in own[:_LISTED]]
        more = [f"and {len(own) - _LISTED} more"] if len(own) > _LISTED else []
        rows = sum(part.rows for part in own)
        yield f"{split} is {rows} rows of {len(own)} files in {folder}: {', '.join(listed + more)}"
    if not is_saved(folder) and (described := [file for file in folder.rglob("*.json") if is_description(file)]):
        files = {part.file for part in parts}
        if left_out := sorted(str(file.relative_to(folder)) for file in described if file not in files):
            yield f"left out, since they hold no rows: {', '.join(left_out)}"


def _place(parts: Sequence[Part], split: str, number: int) -> str:
    for part in parts:
        if part.split == split:
            if number < part.rows:
                return f"{part.file}, row {number + 1}"
            number -= part.rows
    raise AssertionError("the parts hold all rows of a split")


@contextmanager
def _from_cache() -> Iterator[None]:
    """A context in which `datasets` takes what is in its cache, and does not ask the hub again and again."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _without_media(splits: DatasetDict, setting: str) -> DatasetDict:
    """The splits without columns of pictures or sound: reading a row would open what they name, files or addresses.

    Raises:
        ValueError: such a column is one that prompts refer to.
    """
    for split, rows in splits.items():
        if media := media_columns(rows.features, split, setting):
            splits[split] = rows.remove_columns(media)
    return splits


def media_columns(features: Features, split: str, setting: str) -> list[str]:
    """The columns of pictures or sound, which are to be left out; that is said.

    Raises:
        ValueError: one of them is a column that prompts refer to.
    """
    media = [name for name, kind in features.items() if _opens_files(kind)]
    if shown := [name for name in media if name in MEDIA]:
        raise ValueError(
            f"{setting}: {split} has pictures, sound or films in its column {', '.join(shown)}, and text alone is "
            "learned; if the text stands for itself, remove the column from the data"
        )
    if media:
        say(f"Columns of pictures or sound are left out of {split}: {', '.join(media)}")
    return media


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
            splits = load_dataset(path, name)
            if any(rows.info.builder_name == "csv" for rows in splits.values()):
                splits = load_dataset(path, name, dtype=str, keep_default_na=False)  # cells as they are written
    except Exception as error:
        raise ValueError(
            f"{setting}: there is no file or folder {path!r} here, and reading it from the hub failed "
            f"(data.name: {name}): {reason_of(error) if online else hub.unreachable(setting)}"
        ) from error
    return _without_media(splits, setting)


def reason_of(error: Exception) -> str:
    """What went wrong: `datasets` wraps the real error in one that only says that something went wrong."""
    return str(error.__cause__ or error).strip()


def _absolute(path: str) -> Path:
    return Path(path).expanduser().resolve()


def _only_split(splits: DatasetDict) -> str:
    if len(splits) > 1:
        raise ValueError(f"data.eval_split: say which split of data.eval_path to hold out: {', '.join(splits)}")
    return next(iter(splits))
