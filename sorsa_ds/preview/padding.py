"""How much of what a run computes is padding.

Shapes: N examples, S steps, G examples of a step.
"""

import numpy as np

from sorsa_ds.data.levelling import Positions, levelled

MOST_STEPS = 100
"""Steps that are counted where each has to be dealt out."""


def padding_share(lengths_N: np.ndarray, micro_batch: int, global_batch: int, grouped: bool, seed: int = 0) -> float:
    """The share of positions without a token in an epoch, from 0 to 1.

    Args:
        lengths_N: tokens of each example, in any order.
        micro_batch: examples that are padded to one length.
        global_batch: examples of a step, a multiple of `micro_batch`.
        grouped: whether the examples of a step are sorted by length before they are cut into micro-batches, as training
            does it.
        seed: the seed of the order of examples.
    """
    steps = -(-len(lengths_N) // global_batch)
    lengths = np.zeros(steps * global_batch, dtype=np.int64)  # an empty place costs one position at most
    lengths[: len(lengths_N)] = np.random.default_rng(seed).permutation(lengths_N)
    lengths_SG = lengths.reshape(steps, global_batch)
    if grouped:
        lengths_SG = np.sort(lengths_SG, axis=1)
    computed = micro_batch * int(lengths_SG.reshape(-1, micro_batch).max(axis=1).sum())
    return 1 - int(lengths_N.sum()) / computed


def levelled_positions(
    lengths_N: np.ndarray, most_positions: int, global_batch: int, ranks: int, seed: int = 0
) -> Positions:
    """The positions of the first steps of an epoch with `train.micro_batch_tokens`, of MOST_STEPS at most.

    Args:
        lengths_N: tokens of each example, in any order.
        most_positions: the most positions of a micro-batch.
        global_batch: examples of a step.
        seed: the seed of the order of examples.
    """
    order = np.random.default_rng(seed).permutation(lengths_N)[: MOST_STEPS * global_batch].tolist()
    steps = [order[first : first + global_batch] for first in range(0, len(order), global_batch)]
    return Positions.of((levelled(step, ranks, most_positions), step) for step in steps)
