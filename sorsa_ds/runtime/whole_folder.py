"""Writing a folder that is either complete or absent: under a temporary name, then fsync, then a rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from sorsa_ds.runtime.files import fsync
from sorsa_ds.runtime.folder_lock import LOCK_FILE, RunLock, is_held


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A context that gives an empty folder beside `target` to be filled, and renames it to `target` at the end.

    An error in the body removes the folder. A folder that a killed process has left is removed by the next process.

    Raises:
        OSError: the folder cannot be made, or `target` exists and is not empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f"{escape(target.name)}.tmp-*"):
        if not is_held(leftover):
            shutil.rmtree(leftover)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    lock = RunLock(temporary)
    try:
        temporary.mkdir()
        lock.acquire()
        yield temporary
        (temporary / LOCK_FILE).unlink()
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        os.replace(temporary, target)
        fsync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        lock.release()
