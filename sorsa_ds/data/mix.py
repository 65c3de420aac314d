"""Several data sets as one: which example of which source is learned at which place of a run.

Sources with weights are interleaved as `datasets.interleave_datasets` does it: a seeded draw for each place says whose
turn it is. Each source is passed through in a seeded order of its own, which goes on from one epoch to the next, so no
example of it comes a second time before all of them have come once.
Shapes: S sources, M places of one epoch.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import datasets
import numpy as np
from datasets import Dataset

from sorsa_ds.data.counts import total
from sorsa_ds.data.order import Passes
from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import Example
from sorsa_ds.runtime import digest

DRAWN_AT_ONCE = 1000
"""As many draws as `datasets` makes in one call, which decides what a seed gives."""


class Joined(Examples):
    """The examples of several sources one after the other, none of them copied."""

    def __init__(self, parts: Sequence[Examples]) -> None:
        self._parts = parts
        self._part_ends = list(accumulate(map(len, parts)))
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.counts = total([part.counts for part in parts])
        self.digest = digest.of_bytes("".join(part.digest for part in parts).encode())
        self.largest_token = max(part.largest_token for part in parts)
        self.template = ", ".join(dict.fromkeys(part.template for part in parts))

    def __getitem__(self, index: int) -> Example:
        """The example at a place from 0; a negative one counts from the end. See `Examples`."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = bisect_right(self._part_ends, index)
        return self._parts[part][index - (self._part_ends[part - 1] if part else 0)]


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of any number of sources one after the other."""
    if not parts:
        return Examples.of([])
    return Joined(parts) if len(parts) > 1 else parts[0]


class WeightedPasses(Passes):
    """The order of a weighted mix of sources, as indices into their examples one after the other.

    Args:
        sizes: examples of each source.
        weights: of the sources; their sum does not matter.
        seed: of the draws and of each source's own order.
        until: `first_exhausted` or `all_exhausted`; when an epoch ends, as in `datasets.interleave_datasets`.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, until: str) -> None:
        self._starts_S = np.cumsum([0, *sizes[:-1]])
        self._sizes, self._seed = sizes, seed
        self._source_M = _interleaved(sizes, weights, seed, until)
        counts_S = np.bincount(self._source_M, minlength=len(sizes))
        self._per_epoch = counts_S.tolist()
        self._turn_M = np.empty(len(self._source_M), dtype=np.int64)
        for source, count in enumerate(self._per_epoch):
            self._turn_M[self._source_M == source] = np.arange(count)
        self._passes: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._source_M)

    def index(self, position: int) -> int:
        """The example at a position of the run."""
        epoch, place = divmod(position, len(self))
        source = int(self._source_M[place])
        turn = epoch * self._per_epoch[source] + int(self._turn_M[place])
        number, at = divmod(turn, self._sizes[source])
        return int(self._starts_S[source] + self._pass(source, number)[at])

    def taken(self, positions: int, ends: Sequence[int]) -> list[int]:
        """How many of the first positions take an example of each source."""
        epochs, rest = divmod(positions, len(self))
        counts_S = np.bincount(self._source_M[:rest], minlength=len(ends))
        return (epochs * np.array(self._per_epoch) + counts_S).tolist()

    def _pass(self, source: int, number: int) -> np.ndarray:
        """The order of a source in one of its passes. Only the latest is kept: positions are asked for in turn."""
        kept = self._passes.get(source)
        if kept is None or kept[0] != number:
            order = np.random.default_rng((self._seed, source, number)).permutation(self._sizes[source])
            kept = self._passes[source] = number, order
        return kept[1]


def draws(weights: Sequence[float], seed: int) -> Iterator[int]:
    """The number of the source that each place takes, without end, as `datasets` draws it for streams."""
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.choice(len(weights), size=DRAWN_AT_ONCE, p=shares(weights)).tolist()


def shares(weights: Sequence[float]) -> list[float]:
    """The weights as fractions of their sum."""
    return [weight / sum(weights) for weight in weights]


def _interleaved(sizes: Sequence[int], weights: Sequence[float], seed: int, until: str) -> np.ndarray:
    """The source of each place of an epoch, (M,)."""
    sources = [Dataset.from_dict({"source": np.full(size, source)}) for source, size in enumerate(sizes)]
    mixed = datasets.interleave_datasets(sources, probabilities=shares(weights), seed=seed, stopping_strategy=until)
    return np.asarray(mixed.with_format("numpy")["source"])
