"""The rows of files, converted once into an Arrow file that all ranks of a node and later runs map into memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import datasets
import pyarrow
from datasets import Dataset, DatasetDict, concatenate_datasets
from filelock import FileLock

from sorsa_ds.data.data_files import kind_of
from sorsa_ds.data.json_rows import json_rows
from sorsa_ds.data.parquet_rows import parquet_batches, shared_features
from sorsa_ds.data.row_table import RowTable
from sorsa_ds.data.table_rows import table_rows
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.files import write_json
from sorsa_ds.runtime.json_text import read_json
from sorsa_ds.runtime.whole_folder import whole_folder

_VERSION = 2
"""Of what the readers make of a file: what another version has stored is not read."""
_ROWS, _PARTS = "rows.arrow", "rows_of_files.json"


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one file, which lie behind one another in its split.

    rows: the number of the file's rows.
    """

    split: str
    file: Path
    rows: int


def read_files(files: dict[str, list[Path]]) -> tuple[DatasetDict, list[Part]]:
    """The rows of the files of each split, and how many each file has.

    Raises:
        ValueError: a file cannot be read, is empty, or has a row that cannot be read; or the cache cannot be written.
    """
    for file in chain.from_iterable(files.values()):
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty")
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "sorsa_ds" / _key(files)
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.exists():
                    _store(files, folder)
    except OSError as error:
        raise ValueError(f"{folder}: rows cannot be stored there ({error.strerror or error})") from error
    flat = [(split, file) for split, those in files.items() for file in those]
    try:
        counts = read_json(folder / _PARTS)
        parts = [Part(split, file, int(rows)) for (split, file), rows in zip(flat, counts, strict=True)]
        return _splits(Dataset.from_file(str(folder / _ROWS)), parts), parts
    except Exception as error:  # a damaged Arrow file gives errors of many kinds
        raise ValueError(
            f"{folder}: the rows stored there are damaged ({error}); remove this folder, and they will be made again"
        ) from error


def _key(files: dict[str, list[Path]]) -> str:
    """Digest of all that tells whether files are what they were when they were read."""
    facts = [
        # The time of writing alone is not enough: tools that copy, such as rsync and tar, set it to what it was.
        (split, str(file.resolve()), (found := file.stat()).st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
        for split, those in files.items()
        for file in those
    ]
    return digest.of_bytes(repr((_VERSION, facts)).encode(errors="surrogateescape"))


def _store(files: dict[str, list[Path]], folder: Path) -> None:
    """Convert files. Without locks another process may do the same at the same time, and be done first."""
    flat = list(chain.from_iterable(files.values()))
    write = _store_parquet if kind_of(flat[0]) == "parquet" else _store_text
    try:
        with whole_folder(folder) as made:
            counts = write(flat, made)
            write_json(made / _PARTS, counts)
    except OSError:
        if not folder.exists():
            raise


def _store_text(files: Sequence[Path], folder: Path) -> list[int]:
    table = RowTable(folder)
    counts = []
    for file in files:
        rows = table.add(file, json_rows(file) if kind_of(file) == "json" else table_rows(file))
        if not rows:
            raise ValueError(f"{file} is empty" if kind_of(file) == "json" else f"{file} has no row below its first")
        counts.append(rows)
    table.close(folder / _ROWS)
    return counts


def _store_parquet(files: Sequence[Path], folder: Path) -> list[int]:
    features = shared_features(files)
    counts = []
    with pyarrow.ipc.new_stream(str(folder / _ROWS), features.arrow_schema) as writer:
        for file in files:
            counts.append(0)
            for batch in parquet_batches(file, features):
                writer.write_batch(batch)
                counts[-1] += batch.num_rows
    return counts


def _splits(rows: Dataset, parts: Sequence[Part]) -> DatasetDict:
    """Rows by split; those of a split lie behind one another."""
    splits: dict[str, list[Dataset]] = {}
    start = 0
    for part in parts:
        splits.setdefault(part.split, []).append(rows.select(range(start, start + part.rows)))
        start += part.rows
    return DatasetDict({split: concatenate_datasets(found) for split, found in splits.items()})
