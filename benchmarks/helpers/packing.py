"""Packing: several examples in one row, whose positions start again and which do not attend to one another.

The product groups examples by length instead; benchmarks/alternatives.py measures one against the other. Shapes: L
positions of a row.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sorsa_ds.data.tokenize import Example
from sorsa_ds.train.loss import summed_loss


def balanced(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Share examples out over rows of about equal length; returns the numbers of each row's examples.

    The longest is placed first, each into the row that is shortest so far. lengths: tokens of each example.
    """
    packed: list[list[int]] = [[] for _ in range(rows)]
    shortest = [(0, row) for row in range(rows)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length, row = heapq.heappop(shortest)
        packed[row].append(index)
        heapq.heappush(shortest, (length + lengths[index], row))
    return packed


def pack(examples: Sequence[Example]) -> dict[str, Tensor]:
    """One row that holds all examples one after the other, without padding.

    input_ids, labels, position_ids: (1, L) int64. attention_mask: (1, 1, L, L), True where the key's example is the
    query's, and not behind it. An example's first token is never learned, so no label reaches over a seam.
    """
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    of_L = torch.arange(len(examples)).repeat_interleave(lengths)
    row = {
        key: torch.cat([torch.as_tensor(example[key], dtype=torch.int64) for example in examples])[None]
        for key in ("input_ids", "labels")
    }
    row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    row["attention_mask"] = (of_L[:, None] == of_L).tril()[None, None]
    return row


def packed_loss(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    """`summed_loss` of a packed row. The model must use `sdpa` attention, which takes the row's mask as it is."""
    return summed_loss(_Positioned(model, row["position_ids"]), row)


class _Positioned:
    """A model with the positions of its tokens added to its inputs."""

    def __init__(self, model: nn.Module, position_ids: Tensor):
        self.module = getattr(model, "module", model)  # where `summed_loss` looks for the class
        self._model, self._position_ids = model, position_ids

    def __call__(self, **inputs):
        return self._model(**inputs, position_ids=self._position_ids)
