"""Words for messages."""

from pathlib import Path


def cut(text: str, most: int = 200) -> str:
    """A text that others have written, cut where it is longer than a message should be."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def first_lines(text: str, lines: int, width: int) -> str:
    """The first lines of a text, each cut to a width, with dots where something is left out."""
    found = text.splitlines()
    return "\n".join([*(cut(line, width) for line in found[:lines]), *["..."] * (len(found) > lines)])


def typed(path: Path) -> str:
    """A path as a person would type it here: relative to the current folder where it lies in that, else absolute."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
