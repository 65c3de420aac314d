"""The loss of a model whose logits never exist all at once: the output head computes a chunk of positions at a time.

The gradients by the head's inputs and by what of the head is trained are made in the forward pass, while a chunk's
logits are there, as in Liger's fused linear cross-entropy and DeepSpeed's `TiledFusedLogitsLoss`. No product is made
twice. All chunks lie inside of one call of the head's module, so ZeRO-3 gathers the head once for all of them, on every
rank as often, however many chunks a rank has.

What a model makes of its head's output (a soft cap, a scale) is computed by the model's own `forward`, which is called
for each chunk with all its other modules silenced.
Shapes: B sequences, P positions of each that reach the head, K learned tokens, H width, C vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def why_not_chunked(model: PreTrainedModel) -> str | None:
    """Why the loss of a model cannot be computed in chunks, in words; None where it can."""
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None:
        return f"{name} does not say which module is its output head"
    if all(child is not head for child in model.children()):
        return f"the output head of {name} is part of another of its modules"
    if any(parameter.requires_grad for parameter in model.parameters(recurse=False)):
        return f"{name} trains parameters of its own beside its modules"
    parts = [parameter for child in head.children() for parameter in child.parameters()]
    if any(hasattr(parameter, "ds_id") for parameter in parts):
        return f"under ZeRO-3 the parts of the output head of {name} would be gathered anew for each chunk"
    return None


@contextmanager
def losses_in_chunks(
    model: PreTrainedModel, places_K: Tensor, labels_K: Tensor, chunk: int, smoothing: float = 0.0
) -> Iterator[Callable[[], Tensor]]:
    """Context in which a forward pass of a model computes its loss in its head, instead of logits.

    Yields what gives the summed loss after the forward pass, 0-D in float32 or better. The pass returns the same as its
    `logits`: DeepSpeed begins a backward pass where a gradient reaches one of the tensors that its engine has returned.

    Args:
        places_K: where learned positions are among the (B, P) that reach the head, counted row after row.
        labels_K: the tokens to predict there.
        chunk: how many of them have their logits at once.
        smoothing: the share of each label that is spread over the vocabulary.
    """
    head = model.get_output_embeddings()
    within: Any = vars(head)
    own, compute = within.get("forward"), head.forward
    found: list[Tensor] = []

    def forward(hidden_BPH: Tensor) -> Tensor:
        rows_KH = hidden_BPH.flatten(0, -2)[places_K]
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]

        def logits_of(rows: Tensor) -> Tensor:
            return _logits(model, head, compute(rows))

        wanted = torch.is_grad_enabled() and (rows_KH.requires_grad or bool(trained))
        loss = _ChunkedLoss.apply(rows_KH, labels_K, chunk, smoothing, logits_of, wanted, *trained)
        return loss.view(1, 1, 1)

    def keep(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        # After DeepSpeed's hooks, which make ZeRO-3 gather the head before the backward pass of this very tensor.
        found.append(output)

    def give(module: nn.Module, arguments: tuple, outputs: Any) -> None:
        outputs.logits = found[-1]

    hooks = [head.register_forward_hook(keep), model.register_forward_hook(give)]
    head.forward = forward
    try:
        yield lambda: found.pop().view(())
    finally:
        for hook in hooks:
            hook.remove()
        if own is None:
            del head.forward
        else:
            head.forward = own


class _ChunkedLoss(torch.autograd.Function):
    """Sum of -log p of the labels, smoothed or not; the gradients are made with it, scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_KH: Tensor,
        labels_K: Tensor,
        chunk: int,
        smoothing: float,
        logits_of: Callable[[Tensor], Tensor],
        wanted: bool,
        *trained: nn.Parameter,
    ) -> Tensor:
        wide = torch.promote_types(rows_KH.dtype, torch.float32)
        loss = rows_KH.new_zeros((), dtype=wide)
        # Of what is trained, chunks are summed in fp32, as one product over all rows would sum.
        grads = [torch.zeros_like(rows_KH), *(torch.zeros_like(one, dtype=wide) for one in trained)] if wanted else []
        for start in range(0, len(rows_KH), chunk):
            rows = rows_KH[start : start + chunk].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = logits_of(rows)
            index = labels_K[start : start + chunk, None]
            log_p = torch.log_softmax(logits.detach(), -1, dtype=wide)
            loss -= log_p.gather(1, index).sum() * (1 - smoothing)
            if smoothing:
                loss -= log_p.sum() * (smoothing / log_p.shape[1])
            if not wanted:
                continue
            slope = log_p.exp_()  # softmax minus the labels' own distribution is the gradient by the logits
            if smoothing:
                slope -= smoothing / slope.shape[1]
            slope.scatter_(1, index, slope.gather(1, index) - (1 - smoothing))
            del log_p
            made = torch.autograd.grad(logits, (rows, *trained), slope.to(logits.dtype), allow_unused=True)
            del logits, slope
            grads[0][start : start + chunk] = made[0]
            for grad, one in zip(grads[1:], made[1:], strict=True):
                if one is not None:
                    grad += one
        ctx.save_for_backward(*grads)
        ctx.dtypes = [one.dtype for one in (rows_KH, *trained)][: len(grads)]
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream[0].view(1)  # 0-D it would be rounded to a gradient's dtype before it is multiplied
        rows, *trained = (
            torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return rows, None, None, None, None, None, *trained


def _logits(model: PreTrainedModel, head: nn.Module, given: Tensor) -> Tensor:
    """What a model makes of its head's output for some rows, (rows, C): its logits."""
    modules = dict(model._modules)
    try:
        for name, child in modules.items():
            if child is not None:
                model._modules[name] = _Silent(child, given[None] if child is head else None)  # type: ignore[assignment]
        ids = torch.zeros(1, 1, dtype=torch.int64, device=given.device)
        return type(model).forward(model, input_ids=ids, use_cache=False).logits.flatten(0, -2)
    finally:
        model._modules.update(modules)


class _Silent:
    """Stands for a module in a call of its model: answers at once, and has the module's own attributes."""

    def __init__(self, module: nn.Module, answer: Tensor | None):
        self._module, self._answer = module, answer

    def __call__(self, *_: Any, **__: Any) -> Any:
        return _Nothing() if self._answer is None else self._answer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return _Silent(value, None) if isinstance(value, nn.Module) else value


class _Nothing:
    """What a silenced module returns. Whatever a model does with it before its head, it stays nothing."""

    def _stay(self, *_: Any, **__: Any) -> "_Nothing":
        return self

    __call__ = __getitem__ = __add__ = __radd__ = __sub__ = __mul__ = __rmul__ = __truediv__ = _stay

    def __getattr__(self, name: str) -> "_Nothing":
        if name.startswith("__"):  # by such names others ask what kind of thing it is
            raise AttributeError(name)
        return self
