"""A lock that says whether a process is at work in a folder. The kernel releases it however the process ends."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"
_SECONDS = 1.0  # how long `acquire` tries: another process that asks `is_held` takes the lock for a moment


class RunLock:
    """The lock of one folder. It is held from `acquire` until `release`, or until this object or this process ends."""

    def __init__(self, folder: Path):
        self._path = folder / LOCK_FILE
        self._file: IO | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ValueError: another process holds it, or the folder cannot be written.
        """
        try:
            file = self._path.open("a")
        except OSError as error:
            raise ValueError(f"{self._path}: cannot be written ({error.strerror})") from error
        until = time.monotonic() + _SECONDS
        while not _taken(file, fcntl.LOCK_EX):
            if time.monotonic() > until:
                file.close()
                raise ValueError(f"{self._path.parent} is in use: another process is at work in it")
            time.sleep(0.05)
        self._file = file

    def release(self) -> None:
        """Give the lock back. Does nothing where it is not held."""
        if self._file is not None:
            # Closing the file alone would leave the lock with children that this process has forked.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None


@contextmanager
def at_work_in(output: Path) -> Iterator[None]:
    """A context that makes a command's output folder and holds its lock.

    Raises:
        ValueError: the folder cannot be made or written, or another process is at work in it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: {output} cannot be made ({error.strerror})") from error
    lock = RunLock(output)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether any process, this one included, holds the lock of a folder. The folder need not be writable."""
    with suppress(FileNotFoundError), (folder / LOCK_FILE).open() as file:
        return not _taken(file, fcntl.LOCK_SH)
    return False


def _taken(file: IO, kind: int) -> bool:
    """Try to take a shared (LOCK_SH) or exclusive (LOCK_EX) lock without waiting, and say whether that worked."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
