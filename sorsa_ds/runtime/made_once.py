"""Folders that are made once and kept: whichever process comes first makes one, and the others wait for it."""

import errno
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from sorsa_ds.runtime.folder_lock import NO_LOCKS
from sorsa_ds.runtime.whole_folder import whole_folder


def made_once(target: Path, fill: Callable[[Path], object], doing: str, say: Callable[[str], None]) -> bool:
    """See to it that a folder is there, complete.

    Args:
        fill: fills the empty folder that it gets.
        doing: what `fill` does, for whoever waits, as in `converts the model`.
        say: is told that another process is waited for.

    Returns:
        Whether this process has made it.

    Raises:
        OSError: the folder cannot be written.
    """
    if target.is_dir():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        _acquire(lock, doing, say)
        return not target.is_dir() and _make(target, fill)
    finally:
        lock.release()


def _make(target: Path, fill: Callable[[Path], object]) -> bool:
    try:
        with whole_folder(target) as folder:
            fill(folder)
            for file in folder.iterdir():
                file.chmod(0o644)  # some libraries write 0600, but the cache may be shared
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process, without a lock, was faster
            raise
        return False
    return True


def _acquire(lock: FileLock, doing: str, say: Callable[[str], None]) -> None:
    """Wait for the lock. Where the file system has none, go on without: to make it twice costs only time."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Waiting for another process that {doing}")
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        say(f"warning: the file system of {lock.lock_file} has no locks ({error.strerror}): going on without")
