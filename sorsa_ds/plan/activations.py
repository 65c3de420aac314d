"""What a forward pass keeps for backward, counted on a model without memory: nothing is estimated by formula.

The model runs on the meta device; every tensor that autograd still keeps at its end is counted once, by the block that
saved it first.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from sorsa_ds.model.experts import Stack
from sorsa_ds.model.packed_attention import known_rows
from sorsa_ds.sorsa.layer import SorsaLinear


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that a forward pass of one micro-batch keeps for backward.

    blocks: what each block keeps.
    inputs: what is left of that for each block where blocks are recomputed, which is the block's input.
    rest: what is kept outside of the blocks, without the logits.
    routed: rows that each token has among the experts of a block: how many of them compute it.
    guessed: why the model cannot run without memory; the inputs and outputs of its linears stand in for what they keep
        then. None where everything was counted.
    """

    blocks: list[int]
    inputs: int
    rest: int
    routed: int = 1
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
        numbers = None if mask is None else q.new_empty(mask.shape)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32), numbers)
        return out

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("a plan runs no backward")


class _GroupedProduct(torch.autograd.Function):
    """Keeps what PyTorch's product of rows with the matrices of their experts keeps, whatever the dtype.

    PyTorch's own has no form for the meta device but in bf16.
    """

    @staticmethod
    def forward(ctx, rows, weights):
        saved = (rows if ctx.needs_input_grad[1] else None, weights if ctx.needs_input_grad[0] else None)
        ctx.save_for_backward(*saved)
        return rows.new_empty(len(rows), weights.shape[-1])

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
    model: PreTrainedModel,
    batch: int,
    length: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    stacks: Sequence[Stack] = (),
    masked: bool = True,
) -> Kept:
    """Run an adapted model, all of it on the meta device, on `batch` sequences of `length` tokens.

    Args:
        dtype: the dtype of the hidden states.
        autocast: the dtype of products under torch.autocast; None where that is off.
        stacks: the experts that the model holds as one parameter, adapted or not.
        masked: whether it gets an attention mask, see `train.padding`.
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
    routed = _Routed(model, stacks, batch * length)
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    # With four sizes a mask is taken as it is, and not looked into.
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device="meta") if masked else None
    inputs = batch * length * model.config.get_text_config().hidden_size * dtype.itemsize
    training = model.training
    try:
        casting = None if autocast is None else _Autocast(autocast)
        hooked = torch.autograd.graph.saved_tensors_hooks(save, lambda one: one.tensor)
        kernels = _kernels(None if casting is None else casting.cast)
        with known_rows(packed=False), kernels, casting or nullcontext(), hooked:
            output = model.train()(input_ids=ids, attention_mask=mask, use_cache=False)
    except (RuntimeError, ValueError) as error:  # of kernels that only run on a GPU, or code that looks at numbers
        guess = _by_linears(model, blocks, batch * length, dtype, stacks, routed.rows)
        return Kept(guess, inputs, 0, routed.rows, str(error).partition("\n")[0])
    finally:
        model.train(training)
        for hook in (*hooks, *routed.hooks):
            hook.remove()
    kept: dict[int | None, int] = defaultdict(int)
    for one in (live for reference in saved if (live := reference()) is not None):
        if one.tensor.is_meta and (place := _storage(one.tensor)) not in seen:
            seen.add(place)
            kept[one.block] += one.tensor.untyped_storage().nbytes()
    del output  # it has kept the graph until here
    return Kept([kept[i] for i in range(len(blocks))], inputs, kept[None], routed.rows)


class _Routed:
    """Notes how many rows each token has among the experts of a block, when a forward pass calls them.

    rows: the most that were seen; before, what the configuration says of it.
    hooks: to be removed after the pass.
    """

    def __init__(self, model: PreTrainedModel, stacks: Sequence[Stack], tokens: int):
        self.rows = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
        self._tokens = tokens
        modules = dict.fromkeys(stack.module for stack in stacks)
        self.hooks = [
            model.get_submodule(name).register_forward_pre_hook(self._note, with_kwargs=True) for name in modules
        ]

    def _note(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        """Read it off the indices of the chosen experts; experts that are called without any get rows of their own."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        chosen = next((value.numel() for value in given if not value.is_floating_point()), None)
        rows = given[0].numel() // given[0].shape[-1] if chosen is None else chosen
        self.rows = max(self.rows, rows // self._tokens)


def _by_linears(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    tokens: int,
    dtype: torch.dtype,
    stacks: Sequence[Stack],
    routed: int,
) -> list[int]:
    """Bytes of the input and output of every linear, per block; twice, for the linear and for its surroundings."""
    experts: dict[nn.Module, int] = defaultdict(int)
    for stack in stacks:
        experts[model.get_submodule(stack.module)] += routed * (stack.out_features + stack.in_features)

    def sides(layer: nn.Module) -> int:
        if isinstance(layer, nn.Linear | Conv1D):
            return sum(layer.weight.shape)
        return layer.out_features + layer.in_features if isinstance(layer, SorsaLinear) else experts.get(layer, 0)

    return [2 * tokens * dtype.itemsize * sum(map(sides, block.modules())) for block in blocks or [model]]


@contextmanager
def _kernels(cast: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Context in which PyTorch's attention keeps what its fused kernels keep; on the meta device it would use none.

    Products of rows with the matrices of their experts keep what PyTorch's kernel keeps.

    Args:
        cast: what autocast does to the inputs of attention.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, **_) -> Tensor:
        if cast is not None:
            q, k, v = cast(q), cast(k), cast(v)
        return _FusedAttention.apply(q, k, v, attn_mask)

    def grouped(rows: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
        return _GroupedProduct.apply(rows, weights)

    def casting(device_type: str, *args: Any, **kwargs: Any) -> AbstractContextManager:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    autocast = torch.autocast
    torch.autocast = casting  # type: ignore[assignment, misc]  # PEFT asks for it on its weights' device, maybe `meta`
    originals = nn.functional.scaled_dot_product_attention, nn.functional.grouped_mm
    nn.functional.scaled_dot_product_attention = attend  # type: ignore[assignment]  # the rest is in **_
    nn.functional.grouped_mm = grouped  # type: ignore[assignment]  # it is called in this way only
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention, nn.functional.grouped_mm = originals
        torch.autocast = autocast  # type: ignore[misc]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
