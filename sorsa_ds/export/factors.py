"""U, s and V themselves, as trained and as they began: the small folder that `sorsa_ds.load_adapter` reads."""

import shutil
from pathlib import Path

from sorsa_ds.model.adapter_file import INITIAL, TRAINED, write_description
from sorsa_ds.run.finished import Progress, Source
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.files import write_atomic


def write(source: Source, folder: Path, progress: Progress) -> None:
    """Fill a folder with copies that are read back.

    Raises:
        ValueError: the disk refuses, or gives something else back.
    """
    for name in progress([INITIAL, TRAINED]):
        original = source.adapter / name
        write_atomic(folder / name, lambda temporary, original=original: shutil.copyfile(original, temporary))
        if digest.of_file(folder / name) != digest.of_file(original):
            raise ValueError(f"{folder / name} reads back differently from what was written; check the disk")
    write_description(folder, source.described)
