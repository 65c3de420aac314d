"""A folder that is there whole or not at all: filled under a temporary name, made durable, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from sorsa_ds.runtime.files import fsync
from sorsa_ds.runtime.folder_lock import FILE, RunLock, is_held


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Context with an empty folder beside `target` to be filled, which gets that name at the end.

    An error in the body removes it; what a killed process has left is removed by the next one.

    Raises:
        OSError: it cannot be made, or there is a `target` already that is not empty.
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
        (temporary / FILE).unlink()
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        os.replace(temporary, target)
        fsync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        lock.release()
