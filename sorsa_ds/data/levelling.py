"""Levelling (`train.micro_batch_tokens`): micro-batches of as many positions instead of as many examples.

A micro-batch of k examples takes k x the longest of them positions, padding included. All ranks wait for the one that
has most of them: in each forward pass under ZeRO-3. So the examples of a step are dealt out such that the positions of
the largest micro-batch of each pass, summed over the passes, are as few as can be found. That counts padding and
waiting alike.

The deal follows from the lengths alone, in integers and in correctly rounded single operations. So every rank, on
whatever processor, finds the same one without asking, and all make the same number of forward passes.

Some dealing out is always best where micro-batches are runs of neighbours in the order of falling length: then only
the sizes of the micro-batches are to be found.
Letters: N examples of a step, T trials, P forward passes, G micro-batches of all ranks in all passes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

_TRIALS, _ROUNDS, _KEPT = 64, 6, 8
"""Deals that are tried at once, how often that is done, and the best ones from which the next are made."""

_MOST_LEVELS = 16
"""Forward passes up to which levels are searched for. With more of them one limit for all micro-batches has to do."""

_CLOSED = 0.5
"""Positions of a level of which all micro-batches are made: room for no example."""

Deal = list[list[list[int]]]
"""For each forward pass the micro-batch of every rank, as places of examples; one without examples is empty."""


def levelled(lengths: Sequence[int], world: int, most_positions: int) -> Deal:
    """Deal the examples of a step out over the ranks, in as few forward passes as hold them.

    The passes with most positions come first. A rank has no examples in a pass only where there are fewer examples
    than micro-batches. Over the whole step the ranks have about as many positions: on ZeRO stages 0 and 1 they wait
    for one another only at its end.

    Args:
        lengths: tokens of each example, one or more.
        most_positions: the most positions of a micro-batch. An example that is longer has a micro-batch for itself.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    falling = [lengths[place] for place in order]
    sizes = _sizes(falling, world, max(most_positions, falling[0]))
    ends = list(accumulate(sizes))
    groups = [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return _in_turns(_without_empty(groups, lengths, world), lengths, world)


def levelled_share(lengths: Sequence[int], rank: int, world: int, most_positions: int) -> list[list[int]]:
    """The part of a step's examples that one rank takes: its micro-batches in turn, see `levelled`."""
    return [at_once[rank] for at_once in levelled(lengths, world, most_positions)]


@dataclass(frozen=True, slots=True)
class Positions:
    """Positions of all ranks in some steps.

    tokens: positions that hold a token.
    computed: positions that are computed, padding and dummies included.
    of_passes: positions if every rank had, in each pass, as many as the fullest rank: what passes while ranks wait for
        one another in each pass.
    of_steps: positions if every rank had, in each step, as many as the fullest rank: what passes while ranks wait once
        per step.
    largest: positions of the largest micro-batch.
    passes: forward passes of a rank.
    """

    tokens: int
    computed: int
    of_passes: int
    of_steps: int
    largest: int
    passes: int

    @classmethod
    def of(cls, steps: Iterable[tuple[Deal, Sequence[int]]]) -> "Positions":
        """Count steps, each as it is dealt out and with the lengths of its examples."""
        tokens = computed = of_passes = of_steps = largest = passes = 0
        for deal, lengths in steps:
            count_PR = [[positions(batch, lengths) for batch in at_once] for at_once in deal]
            world = len(count_PR[0])
            tokens += sum(lengths)
            computed += sum(map(sum, count_PR))
            of_passes += world * sum(map(max, count_PR))
            of_steps += world * max(map(sum, zip(*count_PR, strict=True)))
            largest = max(largest, *map(max, count_PR))
            passes += len(deal)
        return cls(tokens, computed, of_passes, of_steps, largest, passes)

    @property
    def padding(self) -> float:
        """The share of what is computed that holds no token."""
        return 1 - self.tokens / self.computed

    def imbalance(self, each_pass: bool = True) -> float:
        """By what share the slowest rank exceeds the mean, in each pass (as ZeRO-3 waits) or once per step."""
        return (self.of_passes if each_pass else self.of_steps) / self.computed - 1


def positions(batch: Sequence[int], lengths: Sequence[int]) -> int:
    """Positions that a micro-batch computes; that of a rank without examples has one.

    Args:
        batch: places of examples in `lengths`.
    """
    return max(1, len(batch) * max((lengths[place] for place in batch), default=0))


def _sizes(falling: Sequence[int], world: int, limit: int) -> list[int]:
    """Examples of each micro-batch, of which each takes the longest that are left.

    Args:
        limit: positions of a micro-batch, at least those of the longest example.
    """
    passes = -(-len(_filled(falling, limit)) // world)
    even = _evenly_filled(falling, world * passes, limit)
    if passes == 1 or passes > _MOST_LEVELS:  # one level: nothing is better than the lowest that holds the examples
        return even
    searched = _searched(np.array(falling), world, passes, limit)
    return min(even, searched, key=lambda sizes: _waited(falling, sizes, world)) if searched else even


def _filled(falling: Sequence[int], limit: int) -> list[int]:
    """Sizes of micro-batches that are each filled up to the limit, which makes them as few as can be."""
    sizes, taken = list[int](), 0
    while taken < len(falling):
        sizes.append(min(limit // falling[taken], len(falling) - taken))
        taken += sizes[-1]
    return sizes


def _evenly_filled(falling: Sequence[int], most_batches: int, limit: int) -> list[int]:
    """Micro-batches filled up to the lowest limit with which they are no more than so many."""
    low = falling[0]
    while low < limit:
        middle = (low + limit) // 2
        low, limit = (low, middle) if len(_filled(falling, middle)) <= most_batches else (middle + 1, limit)
    return _filled(falling, limit)


def _waited(falling: Sequence[int], sizes: Sequence[int], world: int) -> int:
    """Positions of the largest micro-batch of each pass, over all passes; the largest meet in one pass."""
    firsts = accumulate(sizes[:-1], initial=0)
    return sum(
        sorted((size * falling[first] for size, first in zip(sizes, firsts, strict=True)), reverse=True)[::world]
    )


def _searched(falling_N: np.ndarray, world: int, passes: int, limit: int) -> list[int] | None:
    """Sizes of micro-batches found by trying levels: a level is the limit for the micro-batches of one pass.

    First they are drawn at random, then near the best that were found (the cross-entropy method). The same numbers are
    drawn in every step and on every rank.

    Returns:
        The best sizes; None where no trial has placed all examples.
    """
    draw, best, least = np.random.default_rng(0), np.empty(0, np.int64), 0
    kept_KP, waited_K = np.empty((0, passes), np.int64), np.empty(0, np.int64)
    for number in range(_ROUNDS):
        if number == 0:
            level_TP = _drawn(draw, int(falling_N.sum()), world, passes)
        else:
            level_TP = _near(draw, kept_KP, 48 // number)
        level_TP = level_TP.clip(1, limit)
        level_TP[:, 0] = level_TP[:, 0].clip(falling_N[0])
        size_GT, largest_TP, placed_T = _tried(falling_N, level_TP, world)
        waited_T = largest_TP.sum(1)
        for trial in np.flatnonzero(placed_T):
            if best.size == 0 or waited_T[trial] < least:
                best, least = size_GT[:, trial], waited_T[trial]
        kept_KP = np.concatenate([kept_KP, largest_TP[placed_T]])
        waited_K = np.concatenate([waited_K, waited_T[placed_T]])
        first = np.argsort(waited_K, kind="stable")[:_KEPT]
        kept_KP, waited_K = kept_KP[first], waited_K[first]
        if best.size == 0:
            return None
    return [size for size in best.tolist() if size]


def _drawn(draw: np.random.Generator, tokens: int, world: int, passes: int) -> np.ndarray:
    """Random falling levels (T, P) int64 that hold 2 to 20 % more than the tokens; in units of 1 / 1024."""
    fall_T1 = draw.integers(0, 640, (_TRIALS, 1))
    shape_TP = 1024 - fall_T1 * np.sort(draw.integers(0, 1025, (_TRIALS, passes)), axis=1) // 1024
    more_T1 = draw.integers(1044, 1230, (_TRIALS, 1))
    return tokens * more_T1 * shape_TP // (shape_TP.sum(axis=1, keepdims=True) * 1024 * world)


def _near(draw: np.random.Generator, kept_KP: np.ndarray, far: int) -> np.ndarray:
    """Levels (T, P) int64 near some of the kept ones: each changes by up to 2 x `far` / 1024, all fall a little."""
    shape = (_TRIALS, kept_KP.shape[1])
    moved_TP = draw.integers(-far, far + 1, shape) + draw.integers(-far, far + 1, shape)
    fallen_T1 = draw.integers(0, 12, (_TRIALS, 1))
    chosen_TP = kept_KP[draw.integers(0, len(kept_KP), _TRIALS)]
    return chosen_TP * (1024 + moved_TP * draw.integers(0, 2, shape) - fallen_T1) // 1024


def _tried(falling_N: np.ndarray, level_TP: np.ndarray, world: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Deal out by each row of levels: the longest examples left go where they leave the smallest share of a level free.

    Each level has `world` micro-batches.

    Returns:
        (sizes of the micro-batches, (G, T) int64; positions of the largest one of each pass, (T, P) int64, where the
        largest micro-batches meet in one pass; whether all examples are placed, (T,) bool).
    """
    trials, passes = level_TP.shape
    count, length_N = len(falling_N), np.append(falling_N, 1).astype(np.float64)  # one more for those that are done
    room_TP = level_TP.astype(np.float64)
    room, left, row_T = room_TP.reshape(-1), np.full(trials * passes, world), np.arange(trials) * passes
    taken_T = np.zeros(trials, np.int64)
    size_GT, filled_GT = (np.zeros((world * passes, trials), np.int64) for _ in range(2))
    for number in range(world * passes):
        length_T = length_N[taken_T]
        filled_TP = np.floor(room_TP / length_T[:, None]) * length_T[:, None]
        chosen_T = row_T + (filled_TP / room_TP).argmax(1)
        size_T = np.minimum((filled_TP.reshape(-1)[chosen_T] / length_T).astype(np.int64), count - taken_T)
        size_GT[number], filled_GT[number] = size_T, size_T * length_T
        left[chosen_T] -= 1
        room[chosen_T[left[chosen_T] == 0]] = _CLOSED
        taken_T += size_T
        if (taken_T == count).all():
            break
    largest_TP = -np.sort(-filled_GT, axis=0)[::world].T
    return size_GT, largest_TP, taken_T == count


def _without_empty(groups: list[list[int]], lengths: Sequence[int], world: int) -> list[list[int]]:
    """As many micro-batches as fill whole passes; the largest are halved for those that were missing.

    Some stay empty only where there are fewer examples than micro-batches.
    """
    groups = list(groups)
    whole = -(-len(groups) // world) * world
    while len(groups) < whole:
        largest = max(groups, key=lambda batch: (len(batch) > 1, positions(batch, lengths)))
        half = len(largest) // 2
        if half == 0:
            return groups + [[] for _ in range(whole - len(groups))]
        groups.remove(largest)
        groups += [largest[:half], largest[half:]]
    return groups


def _in_turns(groups: list[list[int]], lengths: Sequence[int], world: int) -> Deal:
    """Micro-batches of similar size in one pass, of which the largest goes to the rank that has least so far."""
    groups = sorted(groups, key=lambda batch: -positions(batch, lengths))
    had, deal = [0] * world, Deal()
    for first in range(0, len(groups), world):
        ranks = sorted(range(world), key=had.__getitem__)
        at_once = dict(zip(ranks, groups[first : first + world], strict=True))
        deal.append([at_once[rank] for rank in range(world)])
        had = [before + positions(batch, lengths) for before, batch in zip(had, deal[-1], strict=True)]
    return deal
