"""The blocks of a model by their numbers: which of its weights lie in those that `adapter.layers` names."""

from collections.abc import Callable, Iterable, Sequence

from sorsa_ds.config.block_ranges import blocks

OUTSIDE_BLOCKS = "not in the blocks that adapter.layers names"


def block_of(name: str) -> int | None:
    """The number of the block that a module or parameter lies in: the first number in its name; None outside of all.

    PEFT's `layers_to_transform` counts so too, where it knows what a model calls its blocks.
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def outside_blocks(
    names: Iterable[str], layers: Sequence[int | str] | int | str, counts: Callable[[str], bool]
) -> dict[str, str]:
    """Those of the names that lie in none of the blocks -> the reason why they are left out, as half a sentence.

    Args:
        layers: the setting `adapter.layers`: which blocks are adapted.
        counts: whether a name belongs to the part of the model whose blocks are counted.

    Raises:
        ValueError: the model has no block of such a number.
    """
    wanted = blocks(layers)
    if wanted is None:
        return {}
    of = {name: block_of(name) for name in names}
    there = [number for name, number in of.items() if number is not None and counts(name)]
    last = max(there, default=-1)
    for some in wanted:
        if some[-1] > last:
            raise ValueError(
                f"adapter.layers: there is no block {some[-1]}: the linears of this model lie in "
                f"{f'blocks {min(there)} to {last}' if there else 'no numbered blocks'}"
            )
    inside = {number for some in wanted for number in some}
    return {name: OUTSIDE_BLOCKS for name, number in of.items() if number not in inside}
