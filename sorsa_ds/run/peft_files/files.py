"""The names of the files in PEFT's format in a run's folder adapter/, and their removal."""

from pathlib import Path

from sorsa_ds.model import peft_names
from sorsa_ds.model.adapter_file import CONFIG

FILES = peft_names.WEIGHTS, peft_names.CONFIG
"""The files, in the order in which they come into place: the description is what others look for."""


def remove_peft_files(folder: Path) -> None:
    """Remove the files in PEFT's format from an adapter's folder; those of an earlier end of the run would be taken for
    what it trains now.

    Files that version 0.1.0 has written under these names are the run's own, and stay: our description lies beside
    PEFT's, and is missing there.

    Raises:
        OSError: the disk refuses.
    """
    if (folder / CONFIG).exists():
        for name in reversed(FILES):
            (folder / name).unlink(missing_ok=True)
