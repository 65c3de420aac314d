"""Whether a process is at work in a folder: a lock that the kernel releases with the process, however it ends."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

FILE = ".lock"
_SECONDS = 1.0  # `is_held` of another process takes the lock for a moment


class RunLock:
    """The lock of one folder, held from `acquire` to `release`, or as long as this object and this process live.

    Raises:
        ValueError: `acquire`: another process holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self._path = folder / FILE
        self._file: IO | None = None

    def acquire(self) -> None:
        """Take the lock."""
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
        """Give it back; nothing where it is not held."""
        if self._file is not None:
            # Closing alone would leave it with children that this process has forked.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None


@contextmanager
def at_work_in(output: Path) -> Iterator[None]:
    """Context with the lock of a command's output folder, which is made.

    Raises:
        ValueError: it cannot be made or written, or another process is at work in it.
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
    """Whether a process, this one too, holds the lock of a folder. The folder need not be writable."""
    with suppress(FileNotFoundError), (folder / FILE).open() as file:
        return not _taken(file, fcntl.LOCK_SH)
    return False


def _taken(file: IO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
