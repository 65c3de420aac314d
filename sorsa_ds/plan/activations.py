"""What a forward pass keeps for backward, counted on a model without memory: nothing is estimated by formula.

The model runs on the meta device; every tensor that autograd saves is counted once, by the block that saved it.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sorsa_ds.layer import SorsaLinear


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of one micro-batch.

    blocks: what each block keeps. inputs: what of it stays where blocks are recomputed, a block's input. rest: what is
    outside of the blocks, without the logits. counted: False where the model cannot run without its kernels, and inputs
    and outputs of its linears stand in for what they keep.
    """

    blocks: list[int]
    inputs: int
    rest: int
    counted: bool


class _FusedAttention(torch.autograd.Function):
    """Keeps what the fused attention kernels keep: q, k, v, the output, a number a row, and the mask as numbers, which
    PyTorch makes anew in every layer."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32), q.new_empty(mask.shape))
        return out

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("a plan runs no backward")


def kept_for_backward(model: PreTrainedModel, batch: int, length: int, dtype: torch.dtype) -> Kept:
    """Run an operated model, all on the meta device, on `batch` sequences of `length` tokens.

    dtype: of the hidden states.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # Every parameter's own storage is no activation; what autograd saves may be a view of another tensor's storage.
    seen = {_storage(parameter) for parameter in model.parameters()} | {_storage(buffer) for buffer in model.buffers()}
    alive: list[Tensor] = []  # a storage that was freed would lend its address to another one
    kept: dict[int | None, int] = defaultdict(int)
    inside: list[int | None] = [None]

    def save(tensor: Tensor) -> Tensor:
        if tensor.is_meta and (place := _storage(tensor)) not in seen:
            seen.add(place)
            alive.append(tensor)
            kept[inside[0]] += tensor.untyped_storage().nbytes()
        return tensor

    hooks = []
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda *_, i=i: inside.__setitem__(0, i)))
        hooks.append(block.register_forward_hook(lambda *_: inside.__setitem__(0, None)))
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device="meta")  # 4-D: taken as it is, not looked into
    inputs = batch * length * model.config.get_text_config().hidden_size * dtype.itemsize
    training = model.training
    try:
        with _fused_attention(), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            model.train()(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception:  # kernels that only run on a GPU, or code that looks at numbers
        return Kept(_by_linears(model, blocks, batch * length, dtype), inputs, 0, counted=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return Kept([kept[i] for i in range(len(blocks))], inputs, kept[None], counted=True)


def _by_linears(model: nn.Module, blocks: list[nn.Module], tokens: int, dtype: torch.dtype) -> list[int]:
    """Input and output of each adapted linear of a block, twice: once for it, once for what stands around it."""
    return [
        sum(
            2 * tokens * dtype.itemsize * (layer.in_features + layer.out_features)
            for layer in block.modules() if isinstance(layer, SorsaLinear)
        )
        for block in blocks or [model]
    ]  # fmt: skip


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Context in which PyTorch's attention keeps what its fused kernels do; on the meta device it would not be one."""
    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = lambda q, k, v, attn_mask, **_: _FusedAttention.apply(
        q, k, v, attn_mask
    )
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
