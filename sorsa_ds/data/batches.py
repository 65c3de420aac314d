"""Padded micro-batches for one rank: those of a training step, and those of the held-out data.

Every rank makes the same number of forward passes, as collective calls need. Where the examples run out, dummies take
their place: they have one token, of which nothing is learned, so they add neither to the loss nor to the number of
learned tokens.
Shapes: B examples, L positions (the longest example).
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sorsa_ds.data.levelling import Positions, levelled, levelled_share
from sorsa_ds.data.order import GlobalOrder, Passes, ShuffledPasses, rank_slices
from sorsa_ds.data.packing import Packing, collate_packed, packed_share
from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import IGNORED, Example

ALIGNMENT = 8
"""What the lengths of aligned batches are multiples of: so many 16-bit numbers are 16 bytes, which tensor cores read at
once."""


class BatchPlan:
    """All training micro-batches of one rank: `plan.micro_batches(step)` for step in range(plan.steps).

    The batches are a pure function of the step, so nothing has to be saved or replayed to continue a run. `steps` and
    `epochs` mean what they mean in TrainConfig. `packing` is None where examples are padded instead.

    micro_batch_tokens: micro-batches of up to so many positions instead of `micro_batch_size` examples; unset: of
        these. The sizes of the batch are the same.
    passes: the order of the examples; unset: every example once in each epoch, in an order given by `seed`.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        micro_batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        pad_token_id: int,
        steps: int | None = None,
        epochs: float = 1.0,
        packing: Packing | None = None,
        micro_batch_tokens: int | None = None,
        passes: Passes | None = None,
    ) -> None:
        self.examples = examples
        self.micro_batch_size = micro_batch_size
        self.accumulation = accumulation
        self.packing = packing
        self.micro_batch_tokens = micro_batch_tokens
        self.rank = rank
        self.world_size = world_size
        self.pad_token_id = pad_token_id
        global_batch = micro_batch_size * world_size * accumulation
        passes = passes or ShuffledPasses(len(examples), seed)
        self.order = GlobalOrder.of_run(passes, global_batch, steps=steps, epochs=epochs)

    @property
    def state(self) -> None:
        """Nothing to save: the step alone says what its batches are. Those of streams need more."""

    @property
    def digest(self) -> str:
        """Digest of all examples in their order; it tells whether a continued run learns from the same data."""
        return self.examples.digest

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.order.steps

    def micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's batches of optimizer step `step` (from 0), as many on every rank.

        There is one for each accumulation step; with `micro_batch_tokens` there may be fewer. See `collate`. With
        packing there may be fewer too; see `collate_packed`.
        """
        if self.packing is not None:
            return [collate_packed(rows, self.pad_token_id) for rows in self.packed(step)]
        indices: Sequence[Sequence[int | None]]
        if self.micro_batch_tokens is not None:
            own, lengths = self._of_step(step)
            share = levelled_share(lengths, self.rank, self.world_size, self.micro_batch_tokens)
            indices = [[own[place] for place in batch] or [None] for batch in share]
        else:
            indices = self.order.micro_batches(
                step, self.rank, self.world_size, self.micro_batch_size, lambda index: int(self.examples.lengths[index])
            )
        return [_batch(self.examples, batch, self.pad_token_id) for batch in indices]

    @property
    def levelled(self) -> str | None:
        """What `micro_batch_tokens` makes of the first step, in words; None without it."""
        if self.micro_batch_tokens is None:
            return None
        lengths = self._of_step(0)[1]
        found = Positions.of([(levelled(lengths, self.world_size, self.micro_batch_tokens), lengths)])
        return (
            f"{found.passes} passes of up to {found.largest:,} positions in the first step, {found.padding:.1%} of all "
            f"padding; the largest of a pass exceed the mean by {found.imbalance():.1%}"
        )

    def _of_step(self, step: int) -> tuple[list[int], list[int]]:
        """The examples of a step, and how long they are."""
        indices = [index for index in self.order.of_step(step) if index is not None]
        return indices, [int(self.examples.lengths[index]) for index in indices]

    def packed(self, step: int) -> list[list[list[Example]]]:
        """This rank's examples of a step in packed rows: those of each row, for each forward pass."""
        assert self.packing is not None
        indices, lengths = self._of_step(step)
        share = packed_share(lengths, self.packing, self.rank, self.world_size, self.accumulation)
        return [[[self.examples[indices[place]] for place in row] for row in rows] for rows in share]


def eval_rounds(examples: Examples, world_size: int, micro_batch_size: int) -> int:
    """How many batches each rank gets of the held-out examples."""
    return math.ceil(len(examples) / (world_size * micro_batch_size))


def eval_batches(
    examples: Examples, rank: int, world_size: int, micro_batch_size: int, pad_token_id: int
) -> Iterator[dict[str, Tensor]]:
    """One rank's share of the held-out examples, the longest first; every rank gets as many batches. See `collate`."""
    falling = np.argsort(-examples.lengths, kind="stable")
    rounds = eval_rounds(examples, world_size, micro_batch_size)
    for places in rank_slices(rounds, rank, world_size, micro_batch_size):
        indices = [int(falling[place]) if place < len(examples) else None for place in places]
        yield _batch(examples, indices, pad_token_id)


def collate(examples: Sequence[Example | None], pad_token_id: int) -> dict[str, Tensor]:
    """Make a batch of input_ids, attention_mask and labels, each (B, L) int64 and padded on the right.

    None among the examples stands for a dummy. The mask is 1 over each example's own length, whatever its tokens are.
    """
    lengths = [1 if example is None else _length(example) for example in examples]
    shape = (len(examples), max(lengths))
    input_ids_BL = torch.full(shape, pad_token_id)
    attention_mask_BL = torch.zeros(shape, dtype=torch.int64)
    labels_BL = torch.full(shape, IGNORED)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        attention_mask_BL[row, :length] = 1
        if example is not None:
            input_ids_BL[row, :length] = torch.as_tensor(example["input_ids"])
            labels_BL[row, :length] = torch.as_tensor(example["labels"])
    return {"input_ids": input_ids_BL, "attention_mask": attention_mask_BL, "labels": labels_BL}


def aligned(batch: dict[str, Tensor], pad_token_id: int, longest: int) -> dict[str, Tensor]:
    """A collated batch (B, L) with padding on the right up to a multiple of ALIGNMENT, but not beyond `longest`."""
    length = batch["input_ids"].shape[1]
    more = max(0, min(math.ceil(length / ALIGNMENT) * ALIGNMENT, longest) - length)
    filled = {"input_ids": pad_token_id, "labels": IGNORED}
    return {name: nn.functional.pad(one, (0, more), value=filled.get(name, 0)) for name, one in batch.items()}


def pad_token_id(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """The id with which batches are padded: that of the pad token, else unk, else end of text, else 0.

    Any id that the model knows would do: labels and mask go by position, so a padded place is neither read nor learned.
    A pad token that was added to the tokenizer alone is passed over. An end token inside an example is read and
    learned, even if the same id serves as padding.

    Args:
        vocabulary: the number of tokens that the model knows.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None and token < vocabulary)


def _length(example: Example) -> int:
    return len(example["input_ids"])


def _batch(examples: Examples, indices: Sequence[int | None], pad_token_id: int) -> dict[str, Tensor]:
    return collate([None if index is None else examples[index] for index in indices], pad_token_id)
