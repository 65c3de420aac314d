"""The batch identity: global = micro-batch x accumulation x ranks. Numbers left open follow from the others.

With `train.micro_batch_tokens` a forward pass has as many examples as fit into a number of positions. The identity is
then that of examples of `data.max_length` tokens: a rank never makes more forward passes than the accumulation steps.
"""

from dataclasses import dataclass
from typing import Literal

from sorsa_ds.config.declare import MOST_EXAMPLES

DEFAULT_MICRO = 2
"""Examples of a forward pass of a rank where the settings leave it open."""

AUTO: Literal["auto"] = "auto"
"""The micro-batch that the planner has to choose (`sorsa_ds.plan.micro_batch`), because it depends on the memory."""


@dataclass(frozen=True)
class BatchSizes:
    """Sizes that satisfy the identity.

    global_size: examples per optimizer step. micro: examples per forward pass of a rank. accumulation: forward passes
    of a rank per optimizer step.
    choices: the micro-batches that the planner has to choose from, smallest first; until then `micro` is the smallest.
    Empty where nothing is left to choose.
    """

    global_size: int
    micro: int
    accumulation: int
    choices: tuple[int, ...] = ()


def data_ranks(world_size: int, sequence_parallel: int) -> int:
    """The number of groups of ranks that take micro-batches of their own.

    Args:
        sequence_parallel: `train.sequence_parallel`, the ranks of a group.

    Raises:
        ValueError: `train.sequence_parallel` does not divide the number of ranks.
    """
    groups, rest = divmod(world_size, sequence_parallel)
    if rest:
        fitting = ", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0)
        raise ValueError(
            f"train.sequence_parallel={sequence_parallel} does not divide the number of ranks, {world_size}: set it to "
            f"one of {fitting}"
        )
    return groups


def told_ranks(world_size: int, sequence_parallel: int) -> str:
    """Who takes micro-batches of its own, in words: every rank, or groups of ranks."""
    if sequence_parallel == 1:
        return f"{world_size} ranks"
    return f"{world_size // sequence_parallel} groups of {sequence_parallel} ranks"


def shard_length(length: int, sequence_parallel: int) -> int:
    """How many positions of a sequence one of the ranks computes that share it: an equal part, rounded up."""
    return -(-length // sequence_parallel)


def check_micro_batch_tokens(asked: int | Literal["auto"] | None, max_length: int, packing: bool) -> None:
    """Stop where `train.micro_batch_tokens` does not go with the settings of the data.

    Raises:
        ValueError: naming both settings and the way out.
    """
    if asked is not None and packing:
        raise ValueError(
            f"train.micro_batch_tokens={asked} makes micro-batches of as many positions, and so does data.packing=true "
            f"with train.micro_batch_size rows of data.max_length tokens: leave one of them out"
        )
    if isinstance(asked, int) and asked < max_length:
        raise ValueError(
            f"train.micro_batch_tokens={asked} has no room for an example of data.max_length={max_length} tokens: it "
            f"must be at least as large"
        )


def most_positions(asked: int | Literal["auto"] | None, micro: int, max_length: int) -> int | None:
    """The largest number of positions of a micro-batch; None where micro-batches have a fixed number of examples.

    Args:
        asked: `train.micro_batch_tokens`.
        micro: the resolved micro-batch.
        max_length: `data.max_length`.
    """
    return micro * max_length if asked == AUTO else asked


def resolve_batch_sizes(
    world_size: int,
    global_size: int | None,
    micro: int | Literal["auto"] | None,
    accumulation: int | None,
    room: int | None = None,
) -> BatchSizes:
    """Derive the numbers that are None from the others.

    The global size does not depend on whether the micro-batch is `auto` or follows from `room`: it is the one that an
    unset micro-batch gives.

    Args:
        room: how many examples of `data.max_length` tokens `train.micro_batch_tokens` holds, where it is a number.

    Raises:
        ValueError: the given numbers contradict each other, or make a larger batch than there can be. The message names
            them and the nearest valid ones.
    """
    if room is not None:
        return _with_room(world_size, global_size, micro, accumulation, room)
    if micro == AUTO:
        sizes = resolve_batch_sizes(world_size, global_size, None, accumulation)
        if accumulation is not None:  # so many accumulations allow for one micro-batch only
            return sizes
        share = sizes.global_size // world_size
        choices = tuple(size for size in range(1, share + 1) if share % size == 0)
        return BatchSizes(sizes.global_size, 1, share, choices)
    if global_size is None:
        micro, accumulation = micro or DEFAULT_MICRO, accumulation or 1
        global_size = micro * accumulation * world_size
        if global_size > MOST_EXAMPLES:
            raise ValueError(
                f"{world_size} ranks x train.micro_batch_size {micro:,} x train.gradient_accumulation_steps "
                f"{accumulation:,} are {global_size:,} examples per optimizer step; there can be up to "
                f"{MOST_EXAMPLES:,}"
            )
        return BatchSizes(global_size, micro, accumulation)
    unit = world_size * (micro or 1) * (accumulation or 1)  # the global size must be a multiple of this
    if global_size % unit or (micro and accumulation and global_size != unit):
        raise ValueError(_message(global_size, unit, world_size, micro, accumulation))
    left = global_size // unit
    if accumulation is not None:
        return BatchSizes(global_size, micro or left, accumulation)
    if micro is None:
        micro = DEFAULT_MICRO if left % DEFAULT_MICRO == 0 else 1
        left //= micro
    return BatchSizes(global_size, micro, left)


def _with_room(
    world_size: int,
    global_size: int | None,
    micro: int | Literal["auto"] | None,
    accumulation: int | None,
    room: int,
) -> BatchSizes:
    """The sizes with the largest micro-batch that fits and divides a rank's share of the global batch.

    Raises:
        ValueError: `resolve_batch_sizes` refuses the other numbers, or a given one is not what follows.
    """
    sizes = resolve_batch_sizes(world_size, global_size, None, accumulation)
    share = sizes.global_size // world_size
    fitting = next(size for size in range(min(room, share), 0, -1) if share % size == 0)
    found = BatchSizes(sizes.global_size, fitting, share // fitting)
    for name, key, given, follows in (
        ("micro_batch_size", "train_micro_batch_size_per_gpu", micro, found.micro),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", accumulation, found.accumulation),
    ):
        if given not in (None, follows):
            raise ValueError(
                f"train.micro_batch_tokens holds {room} examples of data.max_length tokens, so train.{name} "
                f"(JSON: {key}) is {follows} here and cannot be {given}: leave it out, or write "
                f"train.micro_batch_tokens=auto"
            )
    return found


def _message(global_size: int, unit: int, world_size: int, micro: int | None, accumulation: int | None) -> str:
    """Why the given sizes do not fit together, and which would."""
    factors = [f"{world_size} ranks"]
    factors += [f"micro-batch {micro}"] if micro else []
    factors += [f"{accumulation} accumulation steps"] if accumulation else []
    if micro and accumulation:
        way_out = f"their product is {unit}; leave one of them unset"
    else:
        below = global_size // unit * unit
        way_out = "nearest valid sizes: " + " and ".join(str(size) for size in (below, below + unit) if size)
    return f"train.global_batch_size (JSON: train_batch_size) {global_size} is not {' x '.join(factors)}" + (
        f" ({way_out})" if micro and accumulation else f" x a whole number ({way_out})"
    )
