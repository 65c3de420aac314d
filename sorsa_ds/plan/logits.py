"""How many positions of a micro-batch have their logits at once, and what these take (`train.loss_chunk`)."""

LOGIT_BYTES = 12
"""Bytes per logit that exist at once, at most. In fp32 there are the logits and their probabilities, 4 + 4, in bf16
2 + 4 and one more cast, 4 or 2; what a model makes of its head's output, such as a soft cap, adds its own."""

BUDGET = 2**30
"""Bytes of logits that `train.loss_chunk: auto` allows."""

SMALLEST_CHUNK = 256
"""Positions that `auto` keeps together at least: products with fewer rows wait for the head's weight to be read."""


def loss_chunk(asked: int | str, positions: int, vocabulary: int) -> int:
    """How many positions have their logits at once; 0 stands for all.

    Args:
        asked: `train.loss_chunk`.
        positions: the most that a micro-batch has.
        vocabulary: the logits of a position.
    """
    if asked == "auto":
        fitting = BUDGET // (LOGIT_BYTES * vocabulary)
        chunk = max(SMALLEST_CHUNK, fitting // SMALLEST_CHUNK * SMALLEST_CHUNK)
    else:
        chunk = int(asked)
    return chunk if chunk < positions else 0
