"""Sizes on a command line: `80GiB`, `24 GB`, `500MB`."""

import re

from pydantic import ByteSize, TypeAdapter, ValidationError

_READER = TypeAdapter(ByteSize)


def read_bytes(text: str, option: str, hint: str, smallest: str = "1B", largest: str = "1024TiB") -> int:
    """The bytes that a number with its unit means, as in `80GiB` (80 * 2^30) or `80GB` (80 * 10^9).

    Args:
        option: what the message names, as `--gpu_memory`.
        hint: how a size is written, for the message.
        smallest: bound, as `largest`.

    Raises:
        ValueError: the text is not a number with a unit, or the size is out of bounds.
    """
    # Pydantic alone would take a number without a unit, bits, and anything behind the unit.
    if not re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?\s*[A-Za-z]*[bB]\s*", text):
        raise ValueError(f"{option} {text}: {hint}")
    try:
        size, least, most = (int(_READER.validate_python(one.strip())) for one in (text, smallest, largest))
    except ValidationError as error:
        raise ValueError(f"{option} {text}: {hint}") from error
    if not least <= size <= most:
        raise ValueError(f"{option} {text}: must be from {smallest} to {largest}")
    return size
