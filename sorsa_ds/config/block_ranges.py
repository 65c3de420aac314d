"""Numbers of a model's blocks as settings name them: `all`, a number, a range such as `8-15`, or a list of these."""

import re
from collections.abc import Sequence

ALL = "all"


def check_blocks(text: str) -> str:
    """The text, if it stands for blocks.

    Raises:
        ValueError: the text is neither `all` nor a range whose ends are in order.
    """
    if text != ALL:
        _ends(text)
    return text


def blocks(layers: Sequence[int | str] | int | str) -> list[range] | None:
    """The ranges of block numbers that a setting means, in its order; None where it means all blocks.

    Args:
        layers: the setting; each of its texts has passed `check_blocks`.
    """
    given = [layers] if isinstance(layers, int | str) else layers
    if ALL in given:
        return None
    return [range(one, one + 1) if isinstance(one, int) else range(*_ends(one)) for one in given]


def _ends(text: str) -> tuple[int, int]:
    """The first block of a range in words, and the one behind its last.

    Raises:
        ValueError: the text is no range whose ends are in order.
    """
    found = re.fullmatch(r"([0-9]{1,4}) *- *([0-9]{1,4})", text)
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError(f"{text!r} is neither a block's number, nor a range with both ends as 8-15, nor {ALL}")
    return int(found[1]), int(found[2]) + 1
