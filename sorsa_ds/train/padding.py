"""Whether a model needs to be told where padding is. A causal one, padded on the right, does not.

Padding on the right comes after all tokens of its sequence, and a causal model's tokens see none that come after them.
Of an attention mask transformers makes one of B x L x L, for which PyTorch leaves its fastest kernels, and looks at its
values, for which the host waits. Without one there is nothing to make, unless a layer has a window.
Shapes: B sequences, L positions, C vocabulary.
"""

import enum
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sorsa_ds.model.packed_attention import balances_by_mask, known_rows, makes_common_masks, packed_attention
from sorsa_ds.runtime import collectives
from sorsa_ds.train.micro_batch import MicroBatch
from sorsa_ds.train.tried_model import eval_mode, first_tokens, model_of

_LARGEST_MOVE_FP32, _LARGEST_MOVE_NARROW = 1e-4, 0.02
"""By how much logits at real positions may differ relatively without the mask: by rounding. In fp32 none of them may
differ by more; in 16 bits their median, since rounding may send a token to another expert."""


class Padding(enum.Enum):
    """What a model is given for the sake of right padding. Each value is what the run says of it."""

    POSITIONS = "no attention mask, positions counted from 0: the logits at real positions are the same as with a mask"
    NOTHING = "no attention mask: the logits at real positions are the same as with one"
    MASK = "an attention mask"


@contextmanager
def model_inputs(model: PreTrainedModel, micro_batch: MicroBatch, padding: Padding) -> Iterator[dict[str, Any]]:
    """Context in which a model computes a micro-batch, with the arguments for it.

    A micro-batch with padding before or between its tokens gets its mask, whatever `padding` says.
    """
    inputs: dict[str, Any] = {"input_ids": micro_batch.input_ids, "use_cache": False}
    if micro_batch.position_ids is not None:
        with known_rows(packed=True):
            yield inputs | packed_attention(model, micro_batch.position_ids)
    elif padding is Padding.MASK or not micro_batch.padded_right:
        yield inputs | {"attention_mask": micro_batch.attention_mask}
    else:
        if padding is Padding.POSITIONS:
            ids = micro_batch.input_ids
            inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
        with known_rows(packed=False):
            yield inputs


@torch.no_grad()
def choose_padding(
    engine: nn.Module, batch: dict[str, Tensor], device: torch.device, precision: str
) -> tuple[Padding, str]:
    """What a model is to be given for right padding, and that in words with the reason. A collective call.

    A model that balances its experts leaves padding out of that by the mask, so it keeps it. For any other, logits at
    the positions of tokens are compared with and without the mask, on sequences padded to one length (`padded_probe`).

    Args:
        batch: its longest example is taken.
        precision: the run's, `train.precision`.
    """
    model = model_of(engine)
    if balances_by_mask(model):
        return Padding.MASK, f"{Padding.MASK.value}: the loss of the router leaves out padding by it"
    probe = padded_probe(batch).to(device)
    tried = [Padding.NOTHING]
    # Older code makes positions of its own for padding that it adds, and goes wrong with those of others.
    if makes_common_masks(model) and "position_ids" in inspect.signature(model.forward).parameters:
        tried.insert(0, Padding.POSITIONS)
    why = ""
    with eval_mode(engine):
        with_mask = _real_logits(engine, model, probe, Padding.MASK)
        for padding in tried:
            try:
                move = logits_move(_real_logits(engine, model, probe, padding), with_mask, precision)
            except Exception as error:  # any: it is the model's own code, which computes with a mask
                move, why = math.inf, f"without one the model fails ({type(error).__name__}: {error})"
            else:
                why = f"without one the logits at real positions move by {move:.1%}"
            if is_rounding(max(collectives.gather_lists([move])), precision):
                break
        else:
            padding = Padding.MASK
    if padding is Padding.MASK:
        return padding, f"{padding.value}: {why}"
    return padding, padding.value


def padded_probe(batch: dict[str, Tensor]) -> MicroBatch:
    """Three sequences of the longest example's first tokens in several orders: all, a half and an eighth of them.

    They are padded on the right; one for the most part, since a model may go wrong only there.
    """
    ids_L = first_tokens(batch)
    ids_BL = torch.stack([ids_L, ids_L.flip(0), ids_L.roll(len(ids_L) // 2)])
    mask_BL = torch.ones_like(ids_BL)
    for row, share in enumerate((1, 2, 8)):
        mask_BL[row, -(-len(ids_L) // share) :] = 0
    return MicroBatch.of({"input_ids": ids_BL, "attention_mask": mask_BL, "labels": ids_BL})


def _real_logits(engine: nn.Module, model: PreTrainedModel, probe: MicroBatch, padding: Padding) -> Tensor:
    """Logits at the positions that are not padding, (tokens, C) in float32."""
    with model_inputs(model, probe, padding) as inputs:
        return engine(**inputs).logits[probe.attention_mask.bool()].float()


def logits_move(logits: Tensor, wanted: Tensor, precision: str) -> float:
    """How far logits are from others, relatively: the largest distance of a token's in fp32, else the median."""
    # A padding token has an embedding of zeros in some models, and so logits of zero.
    gaps = (logits - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    gap = (gaps.max() if precision == "fp32" else gaps.median()).item()
    return gap if math.isfinite(gap) else math.inf


def is_rounding(move: float, precision: str) -> bool:
    """Whether logits move by no more than rounding does, see `logits_move`."""
    return move <= (_LARGEST_MOVE_FP32 if precision == "fp32" else _LARGEST_MOVE_NARROW)
