"""Whether examples can be given to a model, as its configuration tells before any weight is read."""

import math
from pathlib import Path

from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.data.token_store import Examples
from sorsa_ds.model.language_part import most_positions, text_config
from sorsa_ds.model.skeleton import read_config


def check_fits(folder: Path, loading: LoadingConfig, some: list[Examples], rows: int = 0) -> None:
    """Stop before the model is loaded if an example is too long for it, or holds a token that it does not know.

    Args:
        rows: the least number of rows that the model's embeddings get, for new tokens.

    Raises:
        ValueError: an example is longer than the model takes or holds a token beyond its vocabulary, or the model takes
            sequences of one length only. The message names the number and the limit.
    """
    config = text_config(read_config(folder, loading))
    positions = most_positions(config)
    if getattr(config, "axial_pos_embds", False):
        raise ValueError(
            f"model: {config.model_type} with axial positions is trained on sequences of exactly "
            f"{math.prod(config.axial_pos_shape)} tokens, which examples are not; it cannot be trained here"
        )
    longest = max(int(examples.lengths.max()) for examples in some)
    if positions is not None and longest > positions:
        raise ValueError(f"data.max_length: an example has {longest} tokens, the model takes {positions}; lower it")
    largest = max(examples.largest_token for examples in some)
    if largest >= max(config.vocab_size, rows):
        raise ValueError(
            f"model: its tokenizer makes token {largest}, but it knows only {config.vocab_size}: they do not belong "
            f"together"
        )


def check_length(folder: Path, loading: LoadingConfig, most: int) -> None:
    """Stop where examples of a stream may become too long for the model: they cannot be looked through beforehand.

    Args:
        most: `data.max_length`.

    Raises:
        ValueError: the message names the limit.
    """
    positions = most_positions(read_config(folder, loading))
    if positions is not None and most > positions:
        raise ValueError(
            f"data.max_length: with data.streaming it must not be more than the {positions} tokens that the model takes"
        )
