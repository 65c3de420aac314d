"""What a forward pass keeps for backward, counted on a model without memory: nothing is estimated by formula.

The model runs on the meta device; every tensor that autograd still keeps at its end is counted once, by the block that
saved it first.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from sorsa_ds.sorsa.layer import SorsaLinear


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that a forward pass of one micro-batch keeps for backward.

    blocks: what each block keeps.
    inputs: what is left of that for each block where blocks are recomputed, which is the block's input.
    rest: what is kept outside of the blocks, without the logits.
    guessed: why the model cannot run without memory; the inputs and outputs of its linears stand in for what they keep
        then. None where everything was counted.
    """

    blocks: list[int]
    inputs: int
    rest: int
    guessed: str | None = None

    @property
    def counted(self) -> bool:
        """Whether the bytes were counted, not guessed."""
        return self.guessed is None


class _FusedAttention(torch.autograd.Function):
    """Keeps what the fused attention kernels keep.

    That is q, k, v, the output, one number per row, and the mask as numbers, which PyTorch makes anew in every layer.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32), q.new_empty(mask.shape))
        return out

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("a plan runs no backward")


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Saved:
    """A tensor that autograd keeps, and the block that was running; it lives as long as autograd keeps the tensor."""

    tensor: Tensor
    block: int | None


class _Autocast(TorchFunctionMode):
    """Context in which products are made in `dtype`, as torch.autocast makes them; the meta device has none."""

    PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm, torch.addmm)

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.PRODUCTS:
            args = [self.cast(value) for value in args]
            kwargs = {name: self.cast(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def cast(self, value):
        """An fp32 tensor cast to the narrow dtype; anything else as it is."""
        narrow = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(self._dtype) if narrow else value


def kept_for_backward(
    model: PreTrainedModel, batch: int, length: int, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> Kept:
    """Run an adapted model, all of it on the meta device, on `batch` sequences of `length` tokens.

    Args:
        dtype: the dtype of the hidden states.
        autocast: the dtype of products under torch.autocast; None where that is off.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # Every parameter's own storage is no activation; what autograd saves may be a view of another tensor's storage.
    seen = {_storage(parameter) for parameter in model.parameters()} | {_storage(buffer) for buffer in model.buffers()}
    saved: list[weakref.ref[_Saved]] = []
    inside: list[int | None] = [None]

    def save(tensor: Tensor) -> _Saved:
        one = _Saved(tensor, inside[0])
        saved.append(weakref.ref(one))
        return one

    hooks = []
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda *_, i=i: inside.__setitem__(0, i)))
        hooks.append(block.register_forward_hook(lambda *_: inside.__setitem__(0, None)))
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device="meta")  # 4-D: taken as it is, not looked into
    inputs = batch * length * model.config.get_text_config().hidden_size * dtype.itemsize
    training = model.training
    try:
        casting = None if autocast is None else _Autocast(autocast)
        hooked = torch.autograd.graph.saved_tensors_hooks(save, lambda one: one.tensor)
        with _fused_attention(None if casting is None else casting.cast), casting or nullcontext(), hooked:
            output = model.train()(input_ids=ids, attention_mask=mask, use_cache=False)
    except (RuntimeError, ValueError) as error:  # of kernels that only run on a GPU, or code that looks at numbers
        return Kept(_by_linears(model, blocks, batch * length, dtype), inputs, 0, str(error).partition("\n")[0])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    kept: dict[int | None, int] = defaultdict(int)
    for one in (live for reference in saved if (live := reference()) is not None):
        if one.tensor.is_meta and (place := _storage(one.tensor)) not in seen:
            seen.add(place)
            kept[one.block] += one.tensor.untyped_storage().nbytes()
    del output  # it has kept the graph until here
    return Kept([kept[i] for i in range(len(blocks))], inputs, kept[None])


def _by_linears(model: nn.Module, blocks: Sequence[nn.Module], tokens: int, dtype: torch.dtype) -> list[int]:
    """Bytes of the input and output of every linear, per block; twice, for the linear and for its surroundings."""
    return [
        sum(
            2 * tokens * dtype.itemsize * sum(layer.weight.shape if isinstance(layer, nn.Linear | Conv1D) else
                                              (layer.out_features, layer.in_features))
            for layer in block.modules() if isinstance(layer, nn.Linear | Conv1D | SorsaLinear)
        )
        for block in blocks or [model]
    ]  # fmt: skip


@contextmanager
def _fused_attention(cast: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Context in which PyTorch's attention keeps what its fused kernels keep; on the meta device it would use none.

    Args:
        cast: what autocast does to the inputs.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **_) -> Tensor:
        if cast is not None:
            q, k, v = cast(q), cast(k), cast(v)
        return _FusedAttention.apply(q, k, v, attn_mask)

    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = attend  # type: ignore[assignment]  # the rest is in **_
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
