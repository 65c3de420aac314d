"""The micro-batches of a run whose examples are streamed; see `sorsa_ds.data.batches` for those that are stored."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from sorsa_ds.data.batches import collate
from sorsa_ds.data.counts import Counts, Taken
from sorsa_ds.data.examples import check_same
from sorsa_ds.data.levelling import levelled_share
from sorsa_ds.data.order import share_of
from sorsa_ds.data.streams import ExampleStream
from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import Example
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.background import in_background

Step = tuple[list[Example], Sequence[Sequence[int | None]], dict[str, Any], dict[str, Counts]]
"""The examples of a step, this rank's micro-batches as places in them, and the stream's state and counts behind."""

_MARK = 15
"""The hexadecimal digits of a digest by which the ranks compare a step, beside what they tell one another anyway."""


class StreamBatches:
    """All micro-batches of one rank that are still to come, step by step.

    Every rank reads the examples of the whole step, so a step has the same ones on any number of ranks; that all have
    read the same is seen at each step. The next step's are read in a thread while the present one is computed.

    Args:
        stream: at the first example of the step that comes first.
        device: the device over which the ranks tell one another whether reading has failed.
        steps: optimizer steps of the run.
        micro_batch_tokens: the most positions of a micro-batch, in which a longer example is alone; None: it has
            `micro_batch_size` examples.
    """

    def __init__(
        self,
        stream: ExampleStream,
        *,
        micro_batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        pad_token_id: int,
        steps: int,
        device: torch.device,
        micro_batch_tokens: int | None = None,
    ) -> None:
        self.steps, self.micro_batch_size, self.pad_token_id = steps, micro_batch_size, pad_token_id
        self.micro_batch_tokens = micro_batch_tokens
        self.digest = stream.digest
        self._stream, self._rank, self._world_size, self._device = stream, rank, world_size, device
        self._global_batch = micro_batch_size * world_size * accumulation
        first_step, rest = divmod(stream.taken, self._global_batch)
        assert rest == 0, (stream.taken, self._global_batch)
        self._step, self._examples = first_step - 1, list[Example]()
        self._share: Sequence[Sequence[int | None]] = []
        self._state, self._counts = stream.state, stream.counts
        self._next = self._read_ahead()

    @property
    def state(self) -> dict[str, Any]:
        """Where the stream is behind the step that was asked for last, in what JSON can hold."""
        return self._state

    @property
    def levelled(self) -> str | None:
        """What `micro_batch_tokens` makes of the batches, in words; None without it."""
        most = self.micro_batch_tokens
        return None if most is None else f"micro-batches of up to {most:,} positions"

    @property
    def first(self) -> list[Example]:
        """The examples of the step that comes next, which are waited for. A collective call."""
        return self._read()[0]

    @property
    def taken(self) -> dict[str, Taken]:
        """What became of the rows read up to that step, and the number of examples learned, by source."""
        places = self._state["places"].items()
        return {
            name: Taken(self._counts[name], place["counts"]["learned_rows"] + place["taken"]) for name, place in places
        }

    def micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's batches of the step that was asked for last, or of the next one; see `collate`.

        A collective call.

        Raises:
            ValueError: rows cannot be read or rendered, a source holds nothing to learn, or the ranks have read
                different rows; on every rank.
        """
        if step != self._step:
            assert step == self._step + 1, (step, self._step)
            self._examples, self._share, self._state, self._counts = self._read()
            self._step = step
            if step + 1 < self.steps:
                self._next = self._read_ahead()
        return [
            collate([None if index is None else self._examples[index] for index in batch], self.pad_token_id)
            for batch in self._share
        ]

    def _read(self) -> Step:
        """The step that is read ahead, which is waited for, and which has to be the same on all ranks."""

        def read() -> tuple[tuple[Step, str], int]:
            step = self._next.result()
            found = Examples.of(step[0]).digest
            return (step, found), int(found[:_MARK], 16)

        (step, found), alike = collectives.together_alike(read, self._device)
        if not alike:
            check_same(found, "what a step takes of the streamed data")
        return step

    def _read_ahead(self) -> Future[Step]:
        """Start to read the next step's examples, and to deal them out."""

        def read() -> Step:
            examples = self._stream.take(self._global_batch)
            return examples, self._dealt(examples), self._stream.state, self._stream.counts

        return in_background(read, "stream")

    def _dealt(self, examples: Sequence[Example]) -> Sequence[Sequence[int | None]]:
        """This rank's micro-batches of a step: the places of their examples."""
        lengths = [len(example["input_ids"]) for example in examples]
        if self.micro_batch_tokens is not None:
            share = levelled_share(lengths, self._rank, self._world_size, self.micro_batch_tokens)
            return [batch or [None] for batch in share]
        return share_of(range(len(lengths)), self._rank, self._world_size, self.micro_batch_size, lengths.__getitem__)
