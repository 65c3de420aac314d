"""What attention exchanges among the ranks that compute a sequence together (`train.sequence_parallel`)."""

import math
from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Exchanged:
    """Numbers of one token in one block. All are 0 where no rank shares a sequence with another.

    sent: numbers in the queries, keys, values and outputs of all heads, which travel to the head's rank and back.
    repeated: numbers in the copies of keys and values that DeepSpeed makes where there are fewer heads of them than
        ranks. They are sent too, and attention keeps them.
    """

    sent: int = 0
    repeated: int = 0

    @classmethod
    def of(cls, config: PreTrainedConfig, together: int) -> Self:
        """What a model exchanges.

        Args:
            config: the configuration of the model's language part.
            together: how many ranks share a sequence.
        """
        if together == 1:
            return cls()
        heads, width = config.num_attention_heads, head_width(config)
        key_value = getattr(config, "num_key_value_heads", None) or heads
        copies = max(1, together // key_value)
        return cls(2 * (heads + copies * key_value) * width, 2 * (copies - 1) * key_value * width)


def head_width(config: PreTrainedConfig) -> int:
    """Numbers of one head of attention; the whole width where the configuration knows of no heads."""
    heads = getattr(config, "num_attention_heads", None) or 1
    return getattr(config, "head_dim", None) or config.hidden_size // heads


def of_a_node(together: int, gpus: int) -> int:
    """How many of the ranks that share a sequence are on a node, where they are fewest: consecutive ranks do."""
    return math.gcd(together, gpus)
