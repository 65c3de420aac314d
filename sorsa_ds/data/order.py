"""The order in which examples are learned: seeded, and the same for every number of ranks.

Positions count the examples of a run from its first to its last, epoch after epoch. Optimizer step t takes the
positions [t*G, (t+1)*G), where G is the global batch size, so the set of examples in a step depends on G alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np


class Passes(Protocol):
    """An endless order of examples, epoch after epoch."""

    def __len__(self) -> int:
        """The number of positions of one epoch."""

    def index(self, position: int) -> int:
        """The example at a position, from 0, of the run."""

    def taken(self, positions: int, ends: Sequence[int]) -> list[int]:
        """How many of the first positions take an example of each source.

        Args:
            ends: the index behind the last example of each source.
        """


@dataclass(frozen=True, slots=True)
class ShuffledPasses(Passes):
    """Every example once in each epoch, in a seeded order that is another one in each.

    examples: the number of examples.
    seed: the seed of the order.
    """

    examples: int
    seed: int

    def __len__(self) -> int:
        return self.examples

    def index(self, position: int) -> int:
        """The example at a position."""
        epoch, place = divmod(position, self.examples)
        return int(_permutation(self.examples, self.seed, epoch)[place])

    def taken(self, positions: int, ends: Sequence[int]) -> list[int]:
        """How many of the first positions take an example of each source, whose examples end before `ends`."""
        epochs, rest = divmod(positions, self.examples)
        sources = np.searchsorted(ends, _permutation(self.examples, self.seed, epochs)[:rest], side="right")
        return (epochs * np.diff([0, *ends]) + np.bincount(sources, minlength=len(ends))).tolist()


@dataclass(frozen=True, slots=True)
class GlobalOrder:
    """A run's stream of example indices.

    passes: the endless order of which the run is the beginning.
    global_batch: the global batch size G.
    positions: the number of positions in the run; later ones are empty.
    """

    passes: Passes
    global_batch: int
    positions: int

    @classmethod
    def of_run(
        cls, passes: Passes, global_batch: int, *, steps: int | None = None, epochs: float = 1.0
    ) -> "GlobalOrder":
        """The order of a run of `steps` full batches or, where that is unset, of so many `epochs`."""
        positions = steps * global_batch if steps else max(1, round(len(passes) * epochs))
        return cls(passes, global_batch, positions)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; the batch of the last step may be partly empty."""
        return math.ceil(self.positions / self.global_batch)

    def index(self, position: int) -> int | None:
        """The example at a position; None behind the end of the run."""
        return self.passes.index(position) if position < self.positions else None

    def micro_batches(
        self, step: int, rank: int, world: int, micro_batch: int, length: Callable[[int], int] = lambda index: 0
    ) -> list[list[int | None]]:
        """The examples of one rank in one step: its micro-batches in turn, each of `micro_batch` indices or Nones.

        How the step's examples are dealt out is told by `share_of`.
        """
        return share_of(self.of_step(step), rank, world, micro_batch, length)

    def of_step(self, step: int) -> list[int | None]:
        """The examples of a step, in the order of their positions; None for each position behind the end."""
        start = step * self.global_batch
        return [self.index(position) for position in range(start, start + self.global_batch)]


def share_of(
    indices: Iterable[int | None], rank: int, world: int, micro_batch: int, length: Callable[[int], int]
) -> list[list[int | None]]:
    """The part of a step's examples that one rank takes: its micro-batches in turn.

    The step's examples are sorted by `length`, the longest first, and cut into rows of one micro-batch per rank.
    Examples of a row have similar lengths, so little is padded and ranks wait little for one another; the step's
    gradient, a mean over all its tokens, stays the same. The ranks take turns at having the longest examples of a row,
    because on ZeRO stages 0 and 1 they wait for one another only once per step.
    """
    ordered = sorted(indices, key=lambda index: math.inf if index is None else -length(index))
    accumulation, rest = divmod(len(ordered), world * micro_batch)
    assert rest == 0, (len(ordered), world, micro_batch)
    return [[ordered[place] for place in places] for places in turns(accumulation, rank, world, micro_batch)]


def turns(rounds: int, rank: int, world: int, micro_batch: int) -> list[range]:
    """Like `rank_slices`, but the order of the ranks is turned around in every other row."""
    slices = [rank_slices(rounds, at, world, micro_batch) for at in (rank, world - 1 - rank)]
    return [slices[row % 2][row] for row in range(rounds)]


def rank_slices(rounds: int, rank: int, world: int, micro_batch: int) -> list[range]:
    """The places that a rank takes in each of `rounds` rows of world * micro_batch examples."""
    firsts = ((row * world + rank) * micro_batch for row in range(rounds))
    return [range(first, first + micro_batch) for first in firsts]


@lru_cache(maxsize=2)
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(examples)
