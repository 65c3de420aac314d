"""Folders that `save_to_disk` of `datasets` has written: Arrow files, and descriptions that name them."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets

from sorsa_ds.data.data_files import SPLIT_LIST, STATE
from sorsa_ds.data.stored_rows import Part
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.json_text import read_json


def read_saved(folder: Path, setting: str) -> tuple[DatasetDict, list[Part]]:
    """The splits of a folder (`train`, where it holds one), mapped into memory where they lie.

    Raises:
        ValueError: a description is damaged or names a place outside of the folder, or a file cannot be read.
    """
    try:
        if (folder / SPLIT_LIST).is_file():
            listed = _entry(read_json(folder / SPLIT_LIST), "splits")
            places = {str(split): folder / _plain(split) for split in listed}
        else:
            places = {"train": folder}
        splits, parts = {}, []
        for split, place in places.items():
            state = read_json(place / STATE)
            if isinstance(state, dict) and state.get("_data_files") == []:
                say(f"{setting}: {split} in {folder} has no rows")
                continue
            files = [place / _plain(_entry(entry, "filename")) for entry in _entry(state, "_data_files")]
            read = [Dataset.from_file(str(file)) for file in files]
            splits[split] = concatenate_datasets(read)
            parts += [Part(split, file, len(rows)) for file, rows in zip(files, read, strict=True)]
    except Exception as error:  # a damaged Arrow file gives errors of many kinds
        raise ValueError(f"{setting}: {folder}, as save_to_disk has written it, cannot be read: {error}") from error
    return DatasetDict(splits), parts


def _entry(described: Any, name: str) -> Any:
    if not isinstance(described, dict) or not described.get(name):
        raise ValueError(f"a description has no entry {name!r}")
    return described[name]


def _plain(name: Any) -> str:
    """The name of an entry of the folder.

    Raises:
        ValueError: the value is no name, or leads out of the folder.
    """
    if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a file in it")
    return name
