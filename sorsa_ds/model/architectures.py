"""Architectures that transformers does not define itself, and linears that need an exception in some of them.

RWKV6 and its relatives come with flash-linear-attention, which registers them with transformers when it is imported.
"""

import importlib
from pathlib import Path

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

PACKAGE = "fla.models"

MIXING = {"rwkv6": ("*.attn.x_proj.*", "*.attn.w_proj.*")}
"""Architecture -> the small projections that `all-linear` leaves as they are.

Those of RWKV6 compute how much of the previous token each channel mixes in, and how fast it forgets. They have a low
rank already, and the papers' 176M parameters at rank 64 are exactly the other eight linears of a block."""

UNCALLED = {"rwkv6": ("*.attn.x_proj.2",)}
"""Architecture -> linears that cannot be adapted, because the model reads their weight without calling them."""


def register_architecture(folder: Path | str) -> None:
    """Register a model's architecture with transformers where only flash-linear-attention defines it.

    Nothing happens where transformers knows the architecture, where the model brings its own code, or where its
    configuration cannot be read (transformers says why when it tries).

    Raises:
        ValueError: transformers does not know the architecture, and flash-linear-attention is not installed; the
            message says how to install it.
    """
    try:
        values, _ = PreTrainedConfig.get_config_dict(folder)
    except (OSError, ValueError):
        return
    model_type = values.get("model_type")
    if model_type is None or model_type in CONFIG_MAPPING or "auto_map" in values:
        return
    try:
        importlib.import_module(PACKAGE)
    except ImportError as error:
        raise ValueError(
            f"model: transformers does not know the architecture {model_type!r} of {folder}. If it is one of "
            f"flash-linear-attention's, as rwkv6 is: pip install -e '.[rwkv]' ({error})"
        ) from error


def mixing_linears(model: nn.Module) -> tuple[str, ...]:
    """Globs of the linears that `all-linear` leaves as they are in this model."""
    return MIXING.get(_type(model), ())


def uncalled_linears(model: nn.Module) -> tuple[str, ...]:
    """Globs of the linears that cannot be adapted in this model."""
    return UNCALLED.get(_type(model), ())


def _type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")
