"""Packing (`data.packing`): the examples of a step side by side in rows, with no padding between them.

The rows of a step are planned over all ranks at once, from the lengths of its examples alone. So every rank knows all
of them without asking, a step learns the same examples as without packing, and all ranks make the same number of
forward passes, as ZeRO-3's collective calls need.
Shapes: R rows of a forward pass, L positions (the longest row).
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sorsa_ds.data.order import turns
from sorsa_ds.data.tokenize import IGNORED, Example


@dataclass(frozen=True, slots=True)
class Packing:
    """What fits into one forward pass of a rank: `rows` rows of at most `length` tokens each."""

    rows: int
    length: int

    @classmethod
    def of(cls, micro_batch_size: int, max_length: int, joined: bool) -> "Packing":
        """As many rows of `data.max_length` tokens as a micro-batch has examples: memory is planned for those.

        Args:
            joined: one row of all of them instead, which is never padded. That is for attention kernels whose work
                grows with the examples' own lengths and not with the square of the row's.
        """
        return cls(1, micro_batch_size * max_length) if joined else cls(micro_batch_size, max_length)


def packed_share(
    lengths: Sequence[int], packing: Packing, rank: int, world: int, most_passes: int
) -> list[list[list[int]]]:
    """The part of a step's packed rows that one rank takes: those of each forward pass, see `packed_rows`.

    Passes have rows of similar length, and the ranks take turns at the longest ones, as without packing (`order`).
    """
    rows = packed_rows(lengths, packing, world, most_passes)
    passes = turns(len(rows) // (world * packing.rows), rank, world, packing.rows)
    return [[rows[at] for at in one] for one in passes]


def packed_rows(lengths: Sequence[int], packing: Packing, world: int, most_passes: int) -> list[list[int]]:
    """Share the examples of a step out over the rows of as few forward passes as hold them.

    Args:
        lengths: tokens of each example, at most `data.max_length`.
        most_passes: forward passes of a rank that would hold the examples without packing; they always suffice.

    Returns:
        For each row the places of its examples in `lengths`. The longest row comes first; some may be empty. There are
        `packing.rows` rows for every rank in every pass.
    """
    at_once = world * packing.rows
    fewest, most = max(1, math.ceil(sum(lengths) / (at_once * packing.length))), most_passes
    rows = _longest_first(lengths, most * at_once)
    while fewest < most:
        middle = (fewest + most) // 2
        trial = _longest_first(lengths, middle * at_once)
        if _tokens(trial[0], lengths) <= packing.length:
            rows, most = trial, middle
        else:
            fewest = middle + 1
    assert _tokens(rows[0], lengths) <= packing.length, (lengths, packing, world, most_passes)
    return rows


def _longest_first(lengths: Sequence[int], rows: int) -> list[list[int]]:
    return sorted(balanced(lengths, rows), key=lambda row: -_tokens(row, lengths))


def _tokens(row: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[place] for place in row)


def balanced(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Share examples out over rows of about equal length; returns the places of each row's examples.

    The longest is placed first, each into the row that is shortest so far. Rows of equal length leave little to pad
    where several of them are computed together, and ranks wait little for one another.
    """
    packed: list[list[int]] = [[] for _ in range(rows)]
    shortest = [(0, row) for row in range(rows)]
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length, row = heapq.heappop(shortest)
        packed[row].append(place)
        heapq.heappush(shortest, (length + lengths[place], row))
    return packed


def collate_packed(rows: Sequence[Sequence[Example]], pad_token_id: int) -> dict[str, Tensor]:
    """Make a batch of packed rows: input_ids, attention_mask, labels and position_ids, each (R, L) int64.

    Positions begin at 0 with every example, and attention follows from them (`model.packed_attention`). Each padded
    place is at position 0, so it is an example of its own, which no other sees. The mask only says where examples are.
    An example's first token is never learned: what stands before it belongs to another one.
    """
    shape = (len(rows), max(1, *(sum(len(one["input_ids"]) for one in row) for row in rows)))
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
    }
    for at, row in enumerate(rows):
        end = 0
        for example in row:
            start, end = end, end + len(example["input_ids"])
            batch["input_ids"][at, start:end] = torch.as_tensor(example["input_ids"])
            batch["attention_mask"][at, start:end] = 1
            batch["labels"][at, start + 1 : end] = torch.as_tensor(example["labels"][1:])
            batch["position_ids"][at, start:end] = torch.arange(end - start)
    return batch
