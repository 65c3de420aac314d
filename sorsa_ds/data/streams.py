"""Examples of data that are read while training goes on, of which no more than a block is held.

Every rank reads all rows, so that all know which examples a step has, whatever their number. A source is read in blocks
of rows. The examples of a block are shuffled among one another, in an order that depends on the seed and on the block's
place alone. So the place in the stream is a block and a number of examples taken from it; a run that goes on reads that
block again and takes the next one.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from datasets import IterableDataset

from sorsa_ds.data.counts import Counts
from sorsa_ds.data.mix import draws
from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import Example
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.console import say


@dataclass(frozen=True, slots=True)
class Place:
    """How far a source is read: the block of rows out of which examples are being taken. JSON can hold it.

    passes: over all rows of the source that are finished.
    row: the block's first row, from 0 in its pass.
    taken: examples that are already taken out of the block.
    found: examples in the blocks before it, in its pass.
    counts: what became of the rows of all blocks before this one, in all passes.
    digest: the digest of the block's examples.
    reader: the account that `datasets` gives of where the block begins.
    """

    passes: int = 0
    row: int = 0
    taken: int = 0
    found: int = 0
    counts: Counts = field(default_factory=Counts)
    digest: str = ""
    reader: dict[str, Any] | None = None


class SourceStream:
    """The examples of one source, without end: where the rows end, its next pass begins, which is said.

    Args:
        name: the source's name, for messages.
        rows: the rows of one pass.
        encode: makes a block of rows, given the number of the first one from 1; raises ValueError.
        size: rows of a block.
        seed: the seed of the order in the blocks; any number of integers.
        place: where to go on; None: at the beginning.

    Raises:
        ValueError: the rows cannot be read, or are not those that were read when the place was taken down.
    """

    def __init__(
        self,
        name: str,
        rows: IterableDataset,
        encode: Callable[[list[dict], int], Examples],
        *,
        size: int,
        seed: tuple[int, ...],
        place: Place | None = None,
    ) -> None:
        self._name, self._rows, self._encode, self._size, self._seed = name, rows, encode, size, seed
        self._place, self._block = Place(), Examples.of([])
        self._order: list[int] = []
        self._start = copy.deepcopy(rows.state_dict())
        self._begin(Place())
        self.digest = self._place.digest
        if place is not None and place != self._place:
            self._begin(place)
            if self._place.digest != place.digest:
                raise ValueError(
                    f"{name}: the rows from row {place.row + 1} on are not those that were there when the run was "
                    f"stopped: another version of the data, or of how they are read"
                )

    @property
    def place(self) -> Place:
        """Where the next example is taken."""
        return self._place

    @property
    def counts(self) -> Counts:
        """What became of all rows read so far, those of the present block included."""
        return self._place.counts + self._block.counts

    def take(self) -> Example:
        """The next example.

        Raises:
            ValueError: rows cannot be read or rendered, or a whole pass holds nothing to learn.
        """
        while self._place.taken == len(self._block):
            self._go_on()
        example = self._block[self._order[self._place.taken]]
        self._place = replace(self._place, taken=self._place.taken + 1)
        return example

    def _begin(self, place: Place) -> None:
        """Start to read at a place."""
        reader = place.reader or self._start
        self._rows.load_state_dict(copy.deepcopy(reader))
        self._iterator: Iterator[dict] = iter(self._rows)
        self._read(place, reader)  # because the account is of the last iteration until the new one has given a row

    def _go_on(self) -> None:
        """Read the next block, which may be the first one of the next pass."""
        place, block = self._place, self._block
        place = replace(
            place,
            row=place.row + block.counts.rows,
            taken=0,
            found=place.found + len(block),
            counts=place.counts + block.counts,
        )
        if block.counts.rows == self._size:
            self._read(place, copy.deepcopy(self._rows.state_dict()))
            if self._block.counts.rows:
                return
        if not place.found:
            raise ValueError(f"{self._name}: nothing to learn in any of its {place.row} rows{place.counts.reasons()}")
        say(f"{self._name}: all {place.row:,} rows are read; its pass {place.passes + 2} begins.")
        self._begin(Place(passes=place.passes + 1, counts=place.counts))

    def _read(self, place: Place, reader: dict[str, Any]) -> None:
        """Read the block at a place, at which the iterator is by the reader's account."""
        try:
            rows = list(islice(self._iterator, self._size))
        except Exception as error:  # the readers, the hub's client and the network fail in many ways
            raise ValueError(f"{self._name}: cannot be read behind row {place.row}: {error}") from error
        self._block = self._encode(rows, place.row + 1)
        order = np.random.default_rng((*self._seed, place.passes, place.row))
        self._order = order.permutation(len(self._block)).tolist()
        self._place = replace(place, reader=reader, digest=self._block.digest)


class ExampleStream:
    """The examples of a run: those of one source, or of several, drawn by their weights.

    Args:
        open_source: opens a source by its name, at a place, or at its beginning where that is None.
        weights: source -> its weight; the draws depend on the order of the sources.
        seed: the seed of the draws.
        saved: what `state` gave when the run was stopped; None for a new run.

    Attributes: `sources`, by name; `taken`, the examples taken so far.

    Raises:
        ValueError: a source cannot be read.
    """

    def __init__(
        self,
        open_source: Callable[[str, Place | None], SourceStream],
        weights: dict[str, float],
        seed: int,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.taken = saved["taken"] if saved else 0
        places = {name: _place_of(place) for name, place in saved["places"].items()} if saved else {}
        self.sources = {name: open_source(name, places.get(name)) for name in weights}
        self._draws = islice(draws(list(weights.values()), seed), self.taken, None)
        self._in_order = list(self.sources.values())

    @property
    def digest(self) -> str:
        """Digest of what every source begins with."""
        return digest.of_bytes("".join(source.digest for source in self._in_order).encode())

    @property
    def state(self) -> dict[str, Any]:
        """Where the next example is taken, in what JSON can hold."""
        return {"taken": self.taken, "places": {name: asdict(source.place) for name, source in self.sources.items()}}

    @property
    def counts(self) -> dict[str, Counts]:
        """What became of the rows that are read, by source."""
        return {name: source.counts for name, source in self.sources.items()}

    def take(self, count: int) -> list[Example]:
        """The next examples.

        Raises:
            ValueError: rows cannot be read or rendered, or a source holds nothing to learn.
        """
        taken = [self._in_order[source].take() for source in islice(self._draws, count)]
        self.taken += count
        return taken


def _place_of(saved: dict[str, Any]) -> Place:
    return Place(**{**saved, "counts": Counts(**saved["counts"])})
