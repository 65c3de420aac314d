"""Writing files that nobody ever sees half-written: under a temporary name, then fsync, then a rename."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sorsa_ds.runtime.json_text import finite_json


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, make that file durable, and rename it to `path`.

    Raises:
        ValueError: the disk is full or the folder cannot be written. The message names the file; an older file at
            `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
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
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented JSON file, atomically.

    Raises:
        ValueError: the file cannot be written, or a number is NaN or infinite; the message names it and the file.
    """
    try:
        text = finite_json(value, indent=2, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    write_text(path, text + "\n")


def fsync(path: Path) -> None:
    """Make the content of a file, or the list of names in a folder, durable on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
