"""Rotary positions whose frequencies transformers chooses anew in each call, by the longest sequence in it."""

from transformers import PreTrainedConfig

_BY_LENGTH = ("longrope", "dynamic")


def steady_length(config: PreTrainedConfig) -> int | None:
    """Up to how many positions the frequencies are the same in every call; None where they always are."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [
        rope,
        *(one for one in rope.values() if isinstance(one, dict)),
    ]  # one for each kind of layer, in some models
    lengths = [
        one.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for one in kinds
        if one.get("rope_type") in _BY_LENGTH
    ]
    return min(lengths, default=None)


def rotary_rows(config: PreTrainedConfig, max_length: int) -> list[tuple[str, str]]:
    """The row of the table at the beginning of a run, where results depend on which examples share a micro-batch."""
    steady = steady_length(config)
    if steady is None or max_length <= steady:
        return []
    told = f"a micro-batch with an example of more than {steady} positions has other frequencies than one without"
    return [("rotary positions", f"{told} (longrope, dynamic): results depend on which examples are computed together")]
