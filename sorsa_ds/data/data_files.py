"""Which files are the data, as far as names tell: their kinds, and the files of a folder.

Nothing here imports `datasets`, so that a command can look at its data before it spends seconds on that.
"""

import os
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

from sorsa_ds.config.schema import EMBEDDED_DATA
from sorsa_ds.data.json_rows import is_one_object
from sorsa_ds.runtime.extras import check_extra

KINDS = (
    dict.fromkeys((".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz"), "json")
    | {".parquet": "parquet"}
    | dict.fromkeys((".csv", ".tsv", ".csv.gz", ".tsv.gz"), "csv")
)
"""What a file holds, by its suffix in small letters. A .tsv is a .csv with tabs between its cells."""

STATE, SPLIT_LIST = "state.json", "dataset_dict.json"
"""The descriptions in a folder that `save_to_disk` of `datasets` has written: of one split, and of several."""

_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
_HUBS_OWN = "a description of the hub's"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def check_data(path: str, setting: str, name: str | None = None) -> bool:
    """Stop where data cannot be what it should, as far as that shows without reading it.

    Args:
        setting: name of the setting that gave the path, for error messages.
        name: the name of one of the data sets in a folder, `data.name`.

    Returns:
        Whether the data is the hub's.

    Raises:
        ValueError: there is no such data, a file is empty, its kind is not known, or the package that makes it is
            missing.
    """
    local = Path(path).expanduser()
    if path == EMBEDDED_DATA:
        check_extra("reasoning_gym", f"{setting}={path}")
        return False
    if local.exists():
        local = named_folder(local, name, setting)
        if not is_saved(local):
            for file in data_files(local, setting):
                if file.stat().st_size == 0:
                    raise ValueError(f"{setting}: {file} is empty")
        return False
    if _HUB_NAME.fullmatch(path) and _suffix_of(local) is None:
        return True
    raise ValueError(f"{setting}: no file or folder {path!r} here, and no name of a data set on the hub either")


def named_folder(local: Path, name: str | None, setting: str) -> Path:
    """The folder of one of the data sets in a folder, as copies of the hub's data sets have; `local` without name.

    Raises:
        ValueError: there is no folder of that name in it, or in its folder `data`.
    """
    if name is None:
        return local
    plain = name not in ("", ".", "..") and "/" not in name
    found = [folder for folder in (local / name, local / "data" / name) if plain and folder.is_dir()]
    if not found:
        there = sorted(entry.name for entry in local.iterdir() if entry.is_dir()) if local.is_dir() else []
        listed = ", ".join(there) or "no folder"
        raise ValueError(f"data.name: {local} has no folder {name!r} ({setting}); there is {listed}")
    return found[0]


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` has written a folder."""
    return (folder / STATE).is_file() or (folder / SPLIT_LIST).is_file()


def kind_of(file: Path) -> str:
    """What a data file holds: json, parquet or csv."""
    suffix = _suffix_of(file)
    assert suffix is not None, f"{file} is no data file"
    return KINDS[suffix]


def data_files(local: Path, setting: str) -> list[Path]:
    """The data files of a folder, sorted, at any depth, hidden ones left out; or the one file itself.

    JSON files that describe the data beside them, and hold no rows, are left out too.

    Raises:
        ValueError: the file is of no known kind, or the folder's files are not of one kind.
    """
    known = ", ".join(KINDS)
    if not local.is_dir():
        if _suffix_of(local) is None:
            raise ValueError(f"{setting}: {local} is of no known kind ({known})")
        return [local]
    found = [file for file in _files_below(local) if _suffix_of(file)]
    files = [file for file in found if not _is_description(file)] or found
    kinds = sorted({kind_of(file) for file in files})
    if len(kinds) == 1:
        return files
    told = f"mixes {', '.join(kinds)}" if kinds else "has no data file"
    raise ValueError(f"{setting}: the folder {local} {told}; it takes files of one kind: {known}")


def left_out_files(folder: Path, read: Collection[Path]) -> dict[Path, str]:
    """The files of a folder that were not read, hidden ones apart, with what was seen of each."""
    return {file: _why_left_out(file) for file in _files_below(folder) if file not in read}


def _why_left_out(file: Path) -> str:
    if _suffix_of(file) is None:
        return "no kind of data by its suffix"
    return _HUBS_OWN if file.name in _DESCRIPTIONS else "one object over several lines"


def _is_description(file: Path) -> bool:
    """Whether a file describes the data beside it: it has a name that the hub gives, or holds one indented object."""
    if file.name in _DESCRIPTIONS or file.suffix.lower() != ".json":
        return file.name in _DESCRIPTIONS
    facts = file.stat()
    return _holds_one_object(file, facts.st_size, facts.st_mtime_ns)


@cache
def _holds_one_object(file: Path, size: int, changed: int) -> bool:
    """As `is_one_object`, which parses the whole file, once for each state that a file is in."""
    return is_one_object(file)


def _files_below(folder: Path) -> list[Path]:
    """All files of a folder that are neither hidden nor in a folder that is hidden or as `__pycache__` is."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link that leads back to a folder around it
            folders.clear()
            continue
        seen.add(real)
        found += [Path(place, name) for name in files]
    return sorted(file for file in found if file.is_file() and not _hidden(file.relative_to(folder)))


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts) or any(part.startswith("__") for part in file.parts[:-1])


def _suffix_of(file: Path) -> str | None:
    """The suffix of a file by which its kind is known; None where it has none."""
    name = file.name.lower()
    return next((suffix for suffix in KINDS if name.endswith(suffix)), None)
