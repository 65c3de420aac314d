"""The rows of data sets on the hub, through `datasets`, stored in its cache or streamed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import datasets
from datasets import load_dataset

from sorsa_ds.runtime import hub

# `datasets` would tell the hub of every file that is opened, to count what is used.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def read_hub(path: str, name: str | None, setting: str, **how: Any) -> Mapping[str, Any]:
    """The splits of a data set on the hub. The cells of CSV files are text, as they are written.

    Args:
        name: the name of one of the data set's configurations; None: the only one, or the default.
        setting: name of the setting that gave the path, for error messages.
        how: arguments of `load_dataset`.

    Raises:
        ValueError: there is no such data set, or neither the hub nor a copy in the cache can be read.
    """
    online = True
    try:
        online = hub.can_be_read("dataset", path, "README.md")
        with nullcontext() if online else _from_cache():
            splits = load_dataset(path, name, **how)
            if any(rows.info.builder_name == "csv" for rows in splits.values()):
                splits = load_dataset(path, name, dtype=str, keep_default_na=False, **how)
    except Exception as error:
        raise ValueError(
            f"{setting}: there is no file or folder {path!r} here, and reading it from the hub failed "
            f"(data.name: {name}): {_reason_of(error) if online else hub.unreachable(setting)}"
        ) from error
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


def _reason_of(error: Exception) -> str:
    """What went wrong: `datasets` wraps the real error in one that only says that something went wrong."""
    return str(error.__cause__ or error).strip()
