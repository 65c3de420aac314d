"""Several data sets as one: which example of which source is learned at which place of a run.

Sources with weights are interleaved as `interleave_datasets` does it: a seeded draw for each place says whose
turn it is. Each source is passed through in a seeded order of its own, which goes on from one epoch to the next, so no
example of it comes a second time before all of them have come once.
Shapes: S sources, M places of one epoch, D places drawn at once.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

import numpy as np

from sorsa_ds.data.counts import total
from sorsa_ds.data.order import Passes
from sorsa_ds.data.token_store import Examples
from sorsa_ds.runtime import digest

DRAWN_AT_ONCE = 1000
"""As many draws as `datasets` makes in one call, which decides what a seed gives."""


class _JoinedTokens:
    """The tokens of several sources one behind the other, none of them copied."""

    def __init__(self, parts: Sequence[Examples]) -> None:
        self._parts = [part.tokens for part in parts]
        self._ends = list(accumulate(2 * int(part.lengths.sum(dtype=np.int64)) for part in parts))

    def __getitem__(self, part: slice, /) -> np.ndarray:
        """Numbers of one source: those of an example never lie in two."""
        source = bisect_right(self._ends, part.start)
        before = self._ends[source - 1] if source else 0
        return self._parts[source][part.start - before : part.stop - before]


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of any number of sources one after the other."""
    if not parts:
        return Examples.of([])
    if len(parts) == 1:
        return parts[0]
    return Examples(
        _JoinedTokens(parts),
        np.concatenate([part.lengths for part in parts]),
        total([part.counts for part in parts]),
        digest.of_bytes("".join(part.digest for part in parts).encode()),
        max(part.largest_token for part in parts),
        ", ".join(dict.fromkeys(part.template for part in parts)),
    )


class WeightedPasses(Passes):
    """The order of a weighted mix of sources, as indices into their examples one after the other.

    Args:
        sizes: examples of each source.
        weights: the weight of each source; their sum does not matter.
        seed: the seed of the draws and of each source's own order.
        until: `first_exhausted` or `all_exhausted`; when an epoch ends, as in `interleave_datasets`.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, until: str) -> None:
        self._starts_S = np.cumsum([0, *sizes[:-1]])
        self._sizes, self._seed = sizes, seed
        self._source_M = _interleaved(sizes, weights, seed, until == "all_exhausted")
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
    return chain.from_iterable(drawn_D.tolist() for drawn_D in _drawn(weights, seed))


def shares(weights: Sequence[float]) -> list[float]:
    """The weights as fractions of their sum."""
    return [weight / sum(weights) for weight in weights]


def _drawn(weights: Sequence[float], seed: int) -> Iterator[np.ndarray]:
    """The sources that are drawn for one block of places after the other, (D,) each, without end."""
    generator, chances = np.random.default_rng(seed), shares(weights)
    while True:
        yield generator.choice(len(weights), size=DRAWN_AT_ONCE, p=chances).astype(np.uint16)


def _interleaved(sizes: Sequence[int], weights: Sequence[float], seed: int, whole: bool) -> np.ndarray:
    """The source of each place of an epoch, (M,).

    Args:
        whole: whether the epoch ends when every source has been passed through, and not when the first one has.
    """
    missing_S = np.array(sizes)
    blocks = []
    for drawn_D in _drawn(weights, seed):
        blocks.append(drawn_D)
        missing_S -= np.bincount(drawn_D, minlength=len(sizes))
        if (missing_S.max() if whole else missing_S.min()) <= 0:
            break
    source_M = np.concatenate(blocks)
    lasts = [
        np.flatnonzero(source_M == source)[size - 1] for source, size in enumerate(sizes) if missing_S[source] <= 0
    ]
    return source_M[: (max(lasts) if whole else min(lasts)) + 1]
