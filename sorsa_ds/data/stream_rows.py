"""Rows that are read only as they are asked for, with the account of `datasets` of how far they are read."""

from collections.abc import Iterator
from pathlib import Path

from datasets import Features, IterableDataset

from sorsa_ds.data.data_files import check_data, data_files, is_saved, kind_of, named_folder
from sorsa_ds.data.hub_rows import read_hub
from sorsa_ds.data.json_rows import json_rows
from sorsa_ds.data.parquet_rows import parquet_batches, shared_features
from sorsa_ds.data.saved_rows import read_saved
from sorsa_ds.data.selection import RowRange
from sorsa_ds.data.source import media_columns
from sorsa_ds.data.split_names import splits_of
from sorsa_ds.data.table_rows import table_rows

PLACE = "\0place"
"""The name under which a row of a file carries where it stands, as `FILE, row 3`."""


def open_rows(path: str, name: str | None, split: str | None, setting: str) -> IterableDataset:
    """The rows of one split of a file, a folder or a data set on the hub.

    Args:
        name: the name of a data set in the folder, or of a configuration of one on the hub.
        split: name of the split, without a slice; None: the only one.
        setting: name of the setting that gave the path, for error messages.

    Raises:
        ValueError: there is no such data or split, or it cannot be opened.
    """
    local = Path(path).expanduser()
    splits = _of_folder(named_folder(local, name, setting), setting) if local.exists() else _of_hub(path, name, setting)
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        told = f"there is no split {split} in {path}" if split else f"{path} has several splits"
        raise ValueError(f"{setting}: {told}; say which to take: {', '.join(splits)}")
    rows = splits[split]
    media = media_columns(rows.features, split, setting) if rows.features else []
    return rows.remove_columns(media) if media else rows


def places_of(path: str, name: str | None, split: str, setting: str) -> list[RowRange]:
    """What holds the rows of a split, as far as that is known without reading them: all rows of these count as one.

    Args:
        split: the split's name; where files have a single split, that one is taken, whatever its name.

    Raises:
        ValueError: there are no such files, or it is not clear which of them are meant.
    """
    local = Path(path).expanduser()
    if local.exists():
        local = named_folder(local, name, setting)
        if not is_saved(local):
            splits = _files_of(local, setting)
            files = next(iter(splits.values())) if len(splits) == 1 else splits.get(split, [])
            return [RowRange(str(file.resolve()), 0, 1) for file in files]
        path, name = str(local.resolve()), None
    return [RowRange(f"{path if name is None else f'{path}, {name}'}, split {split}", 0, 1)]


def _of_folder(local: Path, setting: str) -> dict[str, IterableDataset]:
    """The splits of a file or folder, read as `sorsa_ds.data.stored_rows` reads them, and stored nowhere."""
    if is_saved(local):
        return {split: rows.to_iterable_dataset() for split, rows in read_saved(local, setting)[0].items()}
    splits = _files_of(local, setting)
    files = [file for those in splits.values() for file in those]
    try:
        features = shared_features(files) if kind_of(files[0]) == "parquet" else None
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    # The files are shards: a place in the stream is a file and a row of it.
    return {
        split: IterableDataset.from_generator(_placed_rows, gen_kwargs={"files": those, "features": features})
        for split, those in splits.items()
    }


def _files_of(local: Path, setting: str) -> dict[str, list[Path]]:
    """The files of each split of a file or folder."""
    files = data_files(local, setting)
    try:
        return splits_of(local, files) if local.is_dir() else {"train": files}
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def _placed_rows(files: list[Path], features: Features | None) -> Iterator[dict]:
    """The rows of some files, one file after the other; each carries its place."""
    for file in files:
        for number, row in enumerate(_rows(file, features), 1):
            yield {**row, PLACE: f"{file}, row {number}"}


def _rows(file: Path, features: Features | None) -> Iterator[dict]:
    if features is not None:
        for batch in parquet_batches(file, features):
            yield from batch.to_pylist()
    else:
        yield from json_rows(file) if kind_of(file) == "json" else table_rows(file)


def _of_hub(path: str, name: str | None, setting: str) -> dict[str, IterableDataset]:
    check_data(path, setting)
    return dict(read_hub(path, name, setting, streaming=True))
