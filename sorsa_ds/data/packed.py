"""Opening data files, packed or not."""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast


@contextmanager
def opened(file: Path) -> Iterator[io.BufferedReader]:
    """A context with the bytes of a file; those that a .gz file is packed from.

    Raises:
        ValueError: the file cannot be opened, or is no sound archive.
    """
    packed = file.suffix.lower() == ".gz"
    try:
        with file.open("rb") as stream:
            yield io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=stream))) if packed else stream
    except (OSError, EOFError) as error:  # what a damaged archive raises
        raise ValueError(f"{file}, cannot be {'unpacked' if packed else 'read'}: {error}") from error
