"""A micro-batch made ready on the CPU: all that a forward pass and a loss would otherwise ask the device for.

To ask a GPU for a number, or for the places where something holds, makes the host wait until all its kernels are done.
So the counts and the sets of indices are made here, before the batch moves.
Shapes: B sequences, L positions, P positions at which any sequence learns, K learned tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from sorsa_ds.data.tokenize import IGNORED


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """A collated batch with its counts and indices; all tensors are int64.

    input_ids, attention_mask: (B, L); the mask is 1 over each sequence's own tokens.
    position_ids: (B, L) in packed rows, in which each 0 begins an example; otherwise None.
    labels: (K), the learned tokens, row after row.
    positions: (P), rising: after them something is learned. The logits of no other positions are needed.
    places: (K), where the logits that predict `labels` are among those of (B, P), counted row after row.
    places_of_all: (K), where they are among those of (B, L).
    learned: K. tokens: the number of tokens without padding.
    squares: the sum of the squares of the examples' lengths, which attention's work grows with.
    padded_right: whether each sequence's padding, if any, comes after all of its tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    labels: Tensor
    positions: Tensor
    places: Tensor
    places_of_all: Tensor
    learned: int
    tokens: int
    squares: int
    padded_right: bool

    @classmethod
    def of(cls, batch: "MicroBatch | dict[str, Tensor]") -> "MicroBatch":
        """Make a collated batch ready; one that is ready already stays as it is.

        Args:
            batch: input_ids, attention_mask, labels, each (B, L), on the CPU; labels are -100 where nothing is learned.
                A shard of sequences (`train.sequence_shards`) has one label more, that of the token behind it.
                With position_ids, each sequence is a packed row of examples that do not see one another.
        """
        if isinstance(batch, MicroBatch):
            return batch
        mask_BL, labels_BL = batch["attention_mask"], batch["labels"]
        following_BL = labels_BL[:, 1:]  # nothing precedes the first token of a sequence: it is never learned
        learned_BL = following_BL != IGNORED
        positions_P = learned_BL.any(0).nonzero().view(-1)
        rows_K, columns_K = learned_BL.nonzero(as_tuple=True)
        return cls(
            input_ids=batch["input_ids"],
            attention_mask=mask_BL,
            position_ids=batch.get("position_ids"),
            labels=following_BL[learned_BL],
            positions=positions_P,
            places=rows_K * len(positions_P) + torch.searchsorted(positions_P, columns_K),
            places_of_all=rows_K * mask_BL.shape[1] + columns_K,
            learned=len(rows_K),
            tokens=int(mask_BL.sum()),
            squares=_squares(mask_BL, batch.get("position_ids")),
            padded_right=bool((mask_BL[:, 1:] <= mask_BL[:, :-1]).all()),
        )

    def pinned(self) -> Self:
        """A copy in page-locked memory, from which a GPU copies while the host goes on."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """A copy on a device. With `non_blocking` the host does not wait for it, if it comes from pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A copy with every tensor changed."""
        return replace(
            self,
            input_ids=change(self.input_ids),
            attention_mask=change(self.attention_mask),
            position_ids=None if self.position_ids is None else change(self.position_ids),
            labels=change(self.labels),
            positions=change(self.positions),
            places=change(self.places),
            places_of_all=change(self.places_of_all),
        )


def _squares(mask_BL: Tensor, position_ids_BL: Tensor | None) -> int:
    """The sum of the squares of the examples' lengths: of each row's, or of those that a packed row holds."""
    if position_ids_BL is None:
        return int(mask_BL.sum(1).square().sum())
    return int(((2 * position_ids_BL + 1) * mask_BL).sum())  # n^2 = 1 + 3 + ... + (2 n - 1)
