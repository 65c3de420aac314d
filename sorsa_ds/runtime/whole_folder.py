"""Writing a folder that is either complete or absent: under a temporary name, then fsync, then a rename."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sorsa_ds.runtime.files import fsync, private_folder


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A context that gives an empty folder beside `target` to be filled, and renames it to `target` at the end.

    An error in the body removes the folder. A folder that a killed process has left is removed by the next process.

    Raises:
        OSError: the folder cannot be made, or `target` exists and is not empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with private_folder(target) as private:
        folder = private / target.name
        folder.mkdir()
        yield folder
        for path in [*folder.rglob("*"), folder]:
            fsync(path)
        os.replace(folder, target)
    fsync(target.parent)
