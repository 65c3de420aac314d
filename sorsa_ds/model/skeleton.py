"""A model's configuration, and the model on the meta device: all its modules, without memory for its parameters."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.model.architectures import register_architecture
from sorsa_ds.model.language_part import bare_model

_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
FLASH = "flash_attention_2"


def read_config(folder: Path | str, loading: LoadingConfig) -> PreTrainedConfig:
    """The configuration of a model's folder.

    Raises:
        ValueError: the configuration cannot be read, needs code that is not allowed, or asks for a kernel from the hub.
    """
    register_architecture(folder)
    values: dict[str, Any] = {}
    try:
        values, _ = PreTrainedConfig.get_config_dict(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=loading.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "auto_map" in values and not loading.trust_remote_code:
            raise ValueError(_needs_code(folder, values)) from error
        raise ValueError(f"model: {folder} has no configuration that can be read: {error}") from error
    if kernel := next(_hub_kernels(values), None):
        raise ValueError(
            f"model: {folder}/config.json asks for the kernel {kernel!r} of the hub, which is code from the network; "
            f"remove that field, and choose by loading.attn_implementation"
        )
    return config


def _needs_code(folder: Path | str, values: dict[str, Any]) -> str:
    named = values["auto_map"].values() if isinstance(values["auto_map"], dict) else ()
    files = sorted({f"{str(name).rpartition('--')[2].partition('.')[0]}.py" for name in named})
    return (
        f"model: {folder} is of the architecture {values.get('model_type')!r}, which transformers does not have; it "
        f"brings Python code of its own ({', '.join(files)}), which is not run unless you allow it: read it, then set "
        f"loading.trust_remote_code=true (training, preview, plan) or give --trust_remote_code (evaluation, export)"
    )


def attention_of(loading: LoadingConfig) -> str | None:
    """The attention kernel to ask transformers for; None leaves the choice to it, whatever config.json says.

    Raises:
        ValueError: the kernel's package is not installed, for which transformers would take code from the hub.
    """
    if loading.attn_implementation == FLASH and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            f"loading.attn_implementation={FLASH} needs the package flash-attn, which is not installed here: "
            f"install it, or write sdpa where that is set"
        )
    return None if loading.attn_implementation == "auto" else loading.attn_implementation


def skeleton(folder: Path | str, loading: LoadingConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a folder with its parameters on the meta device; its buffers (rotary frequencies) are real.

    Args:
        dtype: the dtype in which a model makes its buffers, unless it says another itself. transformers takes the
            dtype in which a model is loaded, not the files': in bf16, Gemma's embedding scale is 25.25, not 25.298.

    Raises:
        ValueError: the folder's configuration is not one of a causal language model, its architecture needs a package
            that is not installed, or it needs code that is not allowed.
    """
    config, attention = read_config(folder, loading), attention_of(loading)
    try:
        if getattr(config, "rescale_every", 0):
            # At inference RWKV halves its output projections in place every few layers, so that fp16 does not
            # overflow; nothing else changes by it, and SORSA's layers have no such weight to halve.
            config.rescale_every = 0
        # GPT-NeoX has the field is_decoder too, and does not look at it.
        if getattr(config, "is_decoder", True) is False and not config.model_type.startswith("gpt_neox"):
            raise ValueError(f'{config.model_type} sees the tokens that it is to predict, without "is_decoder": true')
        with init_empty_weights(include_buffers=False):
            model = bare_model(config, loading.trust_remote_code, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # what a model's class makes of a configuration that is not for it has no one type
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"model: {folder} cannot be built as a causal language model: {told}") from error
    model.tie_weights()
    return model


def _hub_kernels(values: Any) -> Iterator[str]:
    """The kernels of the hub that a configuration names, at any depth: transformers knows them by their slash."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        if key in _KERNEL_KEYS and "/" in str(value):
            yield str(value)
        yield from _hub_kernels(value)
