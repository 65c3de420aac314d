"""The rows to train on and to hold out: from files, folders, the hub, or generated.

Every rank reads for itself. Files are converted once, under a file lock, into a cache that all ranks map into memory.
Only the generated problems are random, and they are seeded, so all ranks get the same rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Json, LargeList, List
from datasets.features.features import require_decoding

from sorsa_ds.config.schema import EMBEDDED_DATA, DataConfig
from sorsa_ds.data.conversations import MEDIA
from sorsa_ds.data.data_files import check_data, data_files, is_saved, left_out_files, named_folder
from sorsa_ds.data.hub_rows import read_hub
from sorsa_ds.data.saved_rows import read_saved
from sorsa_ds.data.selection import Selected, Splits, overlap, resolve_split
from sorsa_ds.data.split_names import splits_of
from sorsa_ds.data.stored_rows import Part, read_files
from sorsa_ds.data.word_problems import word_problems
from sorsa_ds.runtime.console import say

_LISTED = 10
"""The most files of a kind that are told by name."""


def load_rows(config: DataConfig, seed: int) -> tuple[Dataset, Dataset | None]:
    """Read the training rows, and the held-out rows or None; they have no row in common. See `select`.

    Of a folder it says which files it is, and how many rows each has.

    Args:
        seed: the seed with which the embedded data are generated.
    """
    train, held_out = select(config, seed, tell=say)
    return train.rows(), held_out and held_out.rows()


def select(
    config: DataConfig, seed: int, tell: Callable[[str], object] = lambda line: None
) -> tuple[Selected, Selected | None]:
    """Choose the rows to train on, and those to hold out or None.

    At most `eval_size` rows are held out: the first ones of `eval_path` / `eval_split` where either is set, else the
    last ones of the training rows.

    Args:
        seed: the seed with which the embedded data are generated.
        tell: is told what a folder holds.

    Raises:
        ValueError: the data cannot be found or read, a split does not exist or selects no row, training and held-out
            rows overlap, or no row is left to train on.
    """
    splits = _opened(config.path, config.name, seed, "data.path", tell)
    train = resolve_split(splits, config.train_split, "data.train_split")
    if config.eval_size == 0:
        return train, None
    if config.eval_path is None and config.eval_split is None:
        kept = len(train) - config.eval_size
        if kept < 1:
            raise ValueError(
                f"data.eval_size: nothing is left to train on when {config.eval_size} of {len(train)} rows are held out"
            )
        return train.part(0, kept), train.part(kept, len(train))

    eval_splits = splits
    if config.eval_path is not None and absolute(config.eval_path) != absolute(config.path):
        eval_splits = _opened(config.eval_path, None, seed, "data.eval_path", tell)
    held_out = resolve_split(eval_splits, config.eval_split or _only_split(eval_splits), "data.eval_split")
    if overlap(train.places(), held_out.places()):
        raise ValueError(
            f"data.eval_split: {config.eval_split or 'the only split'} has rows in common with data.train_split "
            f"({config.train_split}), so the held-out loss would be taken on rows that were learned"
        )
    return train, held_out.part(0, config.eval_size)


def open_splits(path: str, name: str | None, seed: int, setting: str = "data.path") -> DatasetDict:
    """Open all splits of a file (its only split is `train`), a folder, a data set on the hub, or the embedded data.

    Of a folder it says which files it is, and how many rows each has.

    Args:
        name: the name of a data set in the folder, or of a configuration of one on the hub.
        seed: the seed with which the embedded data are generated.
        setting: name of the setting that gave the path, for error messages.

    Raises:
        ValueError: there is no such data, it is empty, or it cannot be read.
    """
    return DatasetDict(_opened(path, name, seed, setting, say).rows)


def place_of_row(config: DataConfig, number: int, held_out: bool = False) -> str:
    """Where a row of `load_rows` stands: see `sorsa_ds.data.selection.Selected.place`.

    Args:
        number: the row's number, from 0, among the rows to train on or the rows held out.

    Raises:
        ValueError: the data cannot be read.
    """
    train, other = select(config, 0)
    rows = other if held_out else train
    assert rows is not None, "the number is that of a row"
    return rows.place(number)


def absolute(path: str) -> Path:
    """Where a path leads, whichever way it is written."""
    return Path(path).expanduser().resolve()


def _opened(path: str, name: str | None, seed: int, setting: str, tell: Callable[[str], object]) -> Splits:
    local = Path(path).expanduser()
    if path == EMBEDDED_DATA:
        return Splits(path, name, {"train": word_problems(seed)})
    if not local.exists():
        check_data(path, setting)
        return Splits(path, name, _without_media(DatasetDict(read_hub(path, name, setting)), setting))
    folder = named_folder(local, name, setting)
    rows, parts = _read(folder, setting)
    if folder.is_dir():
        for line in _told(folder, parts):
            tell(f"{setting}: {line}")
    return Splits(path, name, rows, parts)


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
        rows = sum(part.rows for part in own)
        files = _listed(folder, {part.file: part.rows for part in own})
        yield f"{split} is {rows} rows of {len(own)} files in {folder}: {files}"
    if not is_saved(folder) and (others := left_out_files(folder, {part.file for part in parts})):
        yield f"left out: {_listed(folder, others)}"


def _listed(folder: Path, files: Mapping[Path, object]) -> str:
    """The first files of a folder, each with what is said of it, and how many more there are."""
    first = [f"{file.relative_to(folder)} ({told})" for file, told in islice(files.items(), _LISTED)]
    more = [f"and {len(files) - _LISTED} more"] if len(files) > _LISTED else []
    return ", ".join(first + more)


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


def _only_split(splits: Splits) -> str:
    if len(splits.rows) > 1:
        raise ValueError(f"data.eval_split: say which split of data.eval_path to hold out: {', '.join(splits.rows)}")
    return next(iter(splits.rows))
