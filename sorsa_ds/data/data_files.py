"""Which files are the data, as far as names tell: their kinds, and the files of a folder.

Nothing here imports `datasets`, so that a command can look at its data before it spends seconds on that.
"""

import re
from pathlib import Path

from sorsa_ds.config.schema import EMBEDDED_DATA
from sorsa_ds.data.faults import JSON_SUFFIXES

BUILDERS = dict.fromkeys(JSON_SUFFIXES, "json") | {".parquet": "parquet", ".csv": "csv", ".csv.gz": "csv"}
"""Which reader of `datasets` opens a file, by its suffix."""

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def check_data(path: str, setting: str) -> bool:
    """Stop where data cannot be what it should, as far as that shows without reading it.

    Args:
        setting: name of the setting that gave the path, for error messages.

    Returns:
        Whether the data is the hub's.

    Raises:
        ValueError: there is no such data, a file is empty, or its kind is not known.
    """
    local = Path(path).expanduser()
    if path == EMBEDDED_DATA:
        return False
    if local.exists():
        builder_of(local, setting)
        for file in files_of(local):
            if file.stat().st_size == 0:
                raise ValueError(f"{setting}: {file} is empty")
        return False
    if _HUB_NAME.fullmatch(path) and suffix_of(local) is None:
        return True
    raise ValueError(f"{setting}: no file or folder {path!r} here, and no name of a data set on the hub either")


def builder_of(local: Path, setting: str) -> str:
    """Which reader of `datasets` opens a file, or all files of a folder.

    Raises:
        ValueError: the file is of no known kind, or the folder's files are not of one kind.
    """
    kinds = sorted({BUILDERS[suffix] for file in files_of(local) if (suffix := suffix_of(file))})
    if len(kinds) == 1:
        return kinds[0]
    known = ", ".join(BUILDERS)
    if not local.is_dir():
        raise ValueError(f"{setting}: {local} is of no known kind ({known})")
    found = f"mixes {', '.join(kinds)}" if kinds else "has no data file"
    raise ValueError(f"{setting}: the folder {local} {found}; it takes files of one kind: {known}")


def files_of(local: Path) -> list[Path]:
    """The data files of a folder, sorted, at any depth, hidden ones left out; or the one file itself."""
    if not local.is_dir():
        return [local]
    return sorted(file for file in local.rglob("*") if suffix_of(file) and not _hidden(file.relative_to(local)))


def _hidden(file: Path) -> bool:
    """Whether `datasets` passes over a file: it is hidden, or in a folder that is hidden or as `__pycache__` is."""
    return any(part.startswith(".") for part in file.parts) or any(part.startswith("__") for part in file.parts[:-1])


def suffix_of(file: Path) -> str | None:
    """The suffix of a file by which its reader is known; None where it has none."""
    return next((suffix for suffix in BUILDERS if file.name.endswith(suffix)), None)
