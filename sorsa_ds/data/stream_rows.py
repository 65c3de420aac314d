"""Rows that are read only as they are asked for, with the account of `datasets` of how far they are read."""

from collections.abc import Iterator
from pathlib import Path

from datasets import IterableDataset, load_dataset

from sorsa_ds.data.data_files import check_data, data_files, is_saved, kind_of, named_folder
from sorsa_ds.data.json_rows import json_rows
from sorsa_ds.data.parquet_rows import parquet_batches, shared_features
from sorsa_ds.data.saved_rows import read_saved
from sorsa_ds.data.source import media_columns, reason_of
from sorsa_ds.data.split_names import splits_of
from sorsa_ds.data.table_rows import table_rows
from sorsa_ds.runtime import hub


def open_rows(path: str, name: str | None, split: str | None, setting: str) -> IterableDataset:
    """The rows of one split of a file, a folder or a data set on the hub.

    Args:
        name: of a data set in the folder, or configuration of one on the hub.
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


def _of_folder(local: Path, setting: str) -> dict[str, IterableDataset]:
    """The splits of a file or folder, read as `sorsa_ds.data.stored_rows` reads them, and stored nowhere."""
    if is_saved(local):
        return {split: rows.to_iterable_dataset() for split, rows in read_saved(local, setting)[0].items()}
    files = data_files(local, setting)
    try:
        splits = splits_of(local, files) if local.is_dir() else {"train": files}
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    # The files are shards: a place in the stream is a file and a row of it.
    return {
        split: IterableDataset.from_generator(_rows, gen_kwargs={"files": those}) for split, those in splits.items()
    }


def _rows(files: list[Path]) -> Iterator[dict]:
    """The rows of some files, one file after the other."""
    for file in files:
        match kind_of(file):
            case "json":
                yield from json_rows(file)
            case "csv":
                yield from table_rows(file)
            case _:
                features = shared_features([file])
                for batch in parquet_batches(file, features):
                    yield from batch.to_pylist()


def _of_hub(path: str, name: str | None, setting: str) -> dict[str, IterableDataset]:
    check_data(path, setting)
    try:
        if not hub.can_be_read("dataset", path, "README.md"):
            raise ValueError(hub.unreachable(setting))
        splits = load_dataset(path, name, streaming=True)
        if any(rows.info.builder_name == "csv" for rows in splits.values()):
            splits = load_dataset(path, name, streaming=True, dtype=str, keep_default_na=False)  # cells as written
        return dict(splits)
    except Exception as error:
        raise ValueError(
            f"{setting}: there is no file or folder {path!r} here, and streaming it from the hub failed "
            f"(data.name: {name}): {reason_of(error)}"
        ) from error
