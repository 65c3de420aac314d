"""A lock that says whether a process is at work in a folder. The kernel releases it however the process ends."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sorsa_ds.runtime.console import note

LOCK_FILE = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system answers that has no locks."""

_SECONDS = 1.0  # how long `acquire` tries: another process that asks `is_held` takes the lock for a moment
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class FolderLostError(ValueError):
    """A folder that this process holds is no longer where it was. `now` is its new path; None where it was removed."""

    def __init__(self, folder: Path, now: Path | None):
        happened = "was removed" if now is None else f"was renamed to {now}"
        super().__init__(f"{folder} {happened} while this process worked in it; nothing more is written")
        self.now = now


class RunLock:
    """The lock of one folder. It is held from `acquire` until `release`, or until this object or this process ends.

    The attribute `unsupported` says why the file system has no locks; it is empty where it has. Without them a folder
    is held too, but no other process can tell.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK_FILE
        self._file: IO | None = None
        self.unsupported = ""

    def acquire(self) -> None:
        """Take the lock, and warn where the file system has none.

        Raises:
            ValueError: another process holds it, or the folder cannot be written.
        """
        until = time.monotonic() + _SECONDS
        try:
            while not self.take():
                if time.monotonic() > until:
                    raise ValueError(f"{self._path.parent} is in use: another process is at work in it")
                time.sleep(0.05)
        except OSError as error:
            raise ValueError(f"{self._path}: cannot be written ({error.strerror})") from error
        if self.unsupported:
            note(
                f"warning: the file system of {self._path.parent} has no locks ({self.unsupported}): see to it that no "
                f"second process works in this folder"
            )

    def take(self, create: bool = True) -> bool:
        """Try once to take the lock, and say whether that worked.

        Args:
            create: make the lock's file where there is none.

        Raises:
            OSError: the file cannot be opened.
        """
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        self._file = os.fdopen(os.open(self._path, flags, 0o666), "rb+", buffering=0)
        taken = False
        try:
            # The folder may have been replaced between the two calls, and this be the lock of the old one.
            taken = _taken(self._file, fcntl.LOCK_EX) and self._is_in_place()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            taken, self.unsupported = True, str(error.strerror)
        finally:
            if not taken:
                self.release()
        return taken

    def check(self) -> None:
        """Stop where the folder is not at its path any more, whether or not another has taken its place.

        Raises:
            FolderLostError: the folder was renamed or removed; the message says which.
        """
        assert self._file is not None
        if not self._is_in_place():
            now = None
            with suppress(OSError):
                place = os.readlink(f"/proc/self/fd/{self._file.fileno()}")
                now = None if place.endswith(" (deleted)") else Path(place).parent
            raise FolderLostError(self._path.parent, now)

    def release(self) -> None:
        """Give the lock back. Does nothing where it is not held."""
        if self._file is not None:
            # Closing the file alone would leave the lock with children that this process has forked.
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None

    def _is_in_place(self) -> bool:
        """Whether the open file is the one at the lock's path. A path that cannot be looked at is taken to hold it."""
        assert self._file is not None
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path, follow_symlinks=False))
        except OSError as error:
            return error.errno not in _GONE


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
    """Whether any process, this one included, holds the lock of a folder. The folder need not be writable.

    False on a file system without locks, where nobody can tell.
    """
    with suppress(FileNotFoundError), (folder / LOCK_FILE).open() as file:
        try:
            return not _taken(file, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    return False


def _taken(file: IO, kind: int) -> bool:
    """Try to take a shared (LOCK_SH) or exclusive (LOCK_EX) lock without waiting, and say whether that worked."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
