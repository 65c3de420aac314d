"""Attention in packed rows: each example of a row sees itself alone, and its positions begin at 0.

The masks are those that transformers makes from positions which begin again: causal, and windows and chunks counted
inside each example, for each kind of layer of the architecture. Many models would make the same masks by themselves,
but some (gpt-oss, OPT, Falcon) do not hand their positions on, so the masks are made here for all of them. Flash
attention takes no mask: transformers finds the examples' borders in the positions for its kernel of variable lengths.
Shapes: R packed rows, L positions.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils, modeling_flash_attention_utils
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_masks_for_generate

from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.model.skeleton import FLASH

_MASKS = frozenset(name for name in vars(masking_utils) if name.startswith("create_"))


def packed_attention(model: PreTrainedModel, position_ids_RL: Tensor) -> dict[str, Any]:
    """The arguments with which a model computes packed rows: `position_ids` and `attention_mask`.

    The masks are made anew for each batch and shared by its layers.

    Args:
        position_ids_RL: a row's positions; each 0 begins an example.
    """
    shown = torch.empty((*position_ids_RL.shape, 0), dtype=model.dtype, device=position_ids_RL.device)
    make = getattr(model, "create_masks_for_generate", create_masks_for_generate)  # some models have their own
    masks = make(
        config=model.config,
        inputs_embeds=shown,
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids_RL,
    )
    return {"position_ids": position_ids_RL, "attention_mask": masks}


@contextmanager
def known_rows(packed: bool) -> Iterator[None]:
    """Context in which transformers takes it from us whether rows hold several examples, and does not look itself.

    Without a mask it looks whether positions begin again inside a row, once for each kind of layer, and with flash
    attention in every layer. It needs the answer on the host.
    """
    looks = masking_utils.find_packed_sequence_indices
    flash_looks = modeling_flash_attention_utils._is_packed_sequence

    def known(position_ids: Tensor) -> Tensor | None:
        if not packed:
            return None
        return (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)

    masking_utils.find_packed_sequence_indices = known
    if not packed:  # packed rows are told to flash attention by their lengths, which it asks for before it looks
        modeling_flash_attention_utils._is_packed_sequence = lambda position_ids, batch_size: False
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks
        modeling_flash_attention_utils._is_packed_sequence = flash_looks


def joins_rows(loading: LoadingConfig) -> bool:
    """Whether the rows of a forward pass are joined to one.

    Flash attention's kernel takes the examples of one row only, and its work grows with their own lengths. Where a mask
    is needed, it and the work grow with the square of the row.
    """
    return loading.attn_implementation == FLASH


def check_packing(model: PreTrainedModel) -> None:
    """Stop where a model lets tokens reach others by a way that no attention mask closes.

    Args:
        model: the model as transformers builds it; its parameters may be on the meta device.

    Raises:
        ValueError: the model is recurrent, in all of its layers or in some, or its positions or masks are not given by
            the caller. The message says which.
    """
    if (why := why_not_packed(model)) is not None:
        raise ValueError(
            f"data.packing: {type(model).__name__} {why}, so an example would not stay apart from the one before it in "
            f"its row; set data.packing=false (examples of similar length share a micro-batch then)"
        )


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Why the attention masks and positions that a caller gives do not decide which tokens see which, in words."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    recurrent = sorted({kind for kind in kinds if not _is_masked_attention(kind)})
    if recurrent:
        return f"has layers that carry a state from token to token ({', '.join(recurrent)})"
    if getattr(model, "_is_stateful", False):
        return "carries a state from token to token"
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return "mixes neighbouring tokens by a convolution"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "takes no positions (position_ids)"
    if getattr(config, "alibi", False):
        return "counts its positions (ALiBi) over the whole row"
    defined = vars(sys.modules[type(model).__module__]).keys()
    if not makes_common_masks(model):
        return "does not make its attention masks as transformers does"
    if config._attn_implementation == FLASH and any(name.endswith("FlashAttention2") for name in defined):
        return f"does not give positions to {FLASH}"  # its own class for that kernel is older than packed positions
    return None


def makes_common_masks(model: nn.Module) -> bool:
    """Whether the code of a model makes its masks by the functions that transformers has for it."""
    return bool(_MASKS & vars(sys.modules[type(model).__module__]).keys())


def balances_by_mask(model: PreTrainedModel) -> bool:
    """Whether the loss of a model's router takes it from the attention mask which tokens are padding."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def _is_masked_attention(kind: str) -> bool:
    """Whether layers of that kind are attention and nothing else, with a mask that transformers can make."""
    make = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.get(kind)
    return callable(make) and make is not masking_utils.create_recurrent_attention_mask
