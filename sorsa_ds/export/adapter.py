"""A copy of the run's own adapter."""

import shutil
from functools import partial
from pathlib import Path

from sorsa_ds.model.adapter_file import INITIAL, TRAINED, file_of, write_description
from sorsa_ds.run.source import Source, TensorProgress
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.files import write_atomic


def copy_adapter(source: Source, folder: Path, progress: TensorProgress) -> None:
    """Fill a folder with copies of the run's own adapter that are read back.

    Raises:
        ValueError: the disk refuses, or gives something else back.
    """
    for name in progress([INITIAL, TRAINED]):
        original = file_of(source.adapter, name)
        write_atomic(folder / name, partial(shutil.copyfile, original))
        if digest.of_file(folder / name) != digest.of_file(original):
            raise ValueError(f"{folder / name} reads back differently from what was written; check the disk")
    write_description(folder, source.described)
