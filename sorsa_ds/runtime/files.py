"""Writing files and folders that nobody ever sees half-written: beside their place, then fsync, then a rename.

What is being written lies in a folder beside its place that only this user can enter, and whose name nobody can
foresee: no link can be planted there for this process to follow.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sorsa_ds.runtime.folder_lock import RunLock
from sorsa_ds.runtime.json_text import finite_json

_RANDOM = r"[a-z0-9_]{8}"
"""What `tempfile` puts into a name."""
_SECONDS_UNTIL_LOCKED = 60
"""A private folder that has no lock after this time was left by a process that was killed before it took the lock."""


def write_atomic(path: Path, write: Callable[[Path], object], parents: bool = True) -> None:
    """Let `write` fill a file beside `path`, make that file durable, and rename it to `path`.

    Args:
        write: gets the path of an empty file with the same name, alone in a folder.
        parents: make the folder of `path` where there is none.

    Raises:
        ValueError: the disk is full or the folder cannot be written. The message names the file; an older file at
            `path` is still there.
    """
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(path) as folder:
            temporary = folder / path.name
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            write(temporary)
            if temporary.stat().st_mode != mode:
                temporary.chmod(mode)  # safetensors makes files that only their owner can read
            fsync(temporary)
            os.replace(temporary, path)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be written ({why}); a file that was there before is untouched") from error


def write_text(path: Path, text: str, parents: bool = True) -> None:
    """Write a UTF-8 text file atomically.

    Args:
        parents: make the folder of `path` where there is none.
    """
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), parents)


def write_json(path: Path, value: Any, parents: bool = True) -> None:
    """Write a value as an indented JSON file, atomically.

    Args:
        parents: make the folder of `path` where there is none.

    Raises:
        ValueError: the file cannot be written, or a number is NaN or infinite; the message names it and the file.
    """
    try:
        text = finite_json(value, indent=2, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    write_text(path, text + "\n", parents)


def fsync(path: Path) -> None:
    """Make the content of a file, or the list of names in a folder, durable on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def private_folder(beside: Path) -> Iterator[Path]:
    """A context that makes a folder beside a path, for this user alone, and removes it at the end.

    Folders of this kind that killed processes have left beside the same path are removed.

    Raises:
        OSError: the folder cannot be made.
    """
    _sweep(beside)
    folder, lock = _made_and_locked(beside)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _made_and_locked(beside: Path) -> tuple[Path, RunLock]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}.", suffix=".tmp", dir=beside.parent))
        lock = RunLock(folder)
        try:
            if lock.take():
                return folder, lock
        except FileNotFoundError:
            pass
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        # Another process has swept the folder away before it was locked.


def _sweep(beside: Path) -> None:
    """Remove what killed processes have left beside a path; a process that is alive holds the lock of its folder."""
    own = re.compile(rf"{re.escape(f'.{beside.name}.')}{_RANDOM}\.tmp")
    with suppress(OSError):
        for entry in [entry for entry in os.scandir(beside.parent) if own.fullmatch(entry.name)]:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    _remove_unless_held(Path(entry.path))


def _remove_unless_held(folder: Path) -> None:
    """Remove a private folder that nobody holds. One without a lock is removed where it is empty, and not just made.

    Raises:
        OSError: the folder cannot be looked at, or holds files but no lock.
    """
    lock = RunLock(folder)
    try:
        if lock.take(create=False) and not lock.unsupported:
            shutil.rmtree(folder, ignore_errors=True)
    except FileNotFoundError:
        if time.time() - folder.stat().st_mtime > _SECONDS_UNTIL_LOCKED:
            folder.rmdir()
    finally:
        lock.release()
