"""Is the adapted model at step 0 the pre-trained model? Its loss is compared with that of the original weights.

The base model is never built. For one forward pass each adapted layer multiplies with its pre-trained weight instead,
read from disk when its turn comes. That takes the memory of one more layer, and shares nothing with the decomposition,
the exchange and the shards, which are what is checked.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.data.batches import BatchPlan, collate
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.model.load import AdaptedModel
from sorsa_ds.model.sequence_parallel import SequenceParallel
from sorsa_ds.model.targets import Target
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import say
from sorsa_ds.sorsa.layer import compute_dtype
from sorsa_ds.sorsa.routes import Routes
from sorsa_ds.train.loss import LossOptions, mean_loss
from sorsa_ds.train.sequence_shards import shard
from sorsa_ds.train.tried_model import eval_mode, first_tokens, model_of

LARGEST_LOOK_AHEAD = 0.02
"""By how much logits may move relatively when a later token changes. A causal model's move by rounding at most."""

LARGEST_GAP, LARGEST_GAP_4BIT = 0.02, 0.5
"""The values of `train.max_start_gap` where it is unset, over a residual of 8 bits or more and over one of 4.

Rounding to 16 or 8 bits moves a loss by less than 1 %. Rounding to 4 bits moves it by an amount that depends on the
model, 13 % on the default one; the run prints it. A model that is put together wrongly is off by far more."""


def largest_gap(asked: float | None, storage: str) -> float:
    """The largest relative gap of the loss at step 0 that is allowed.

    Args:
        asked: `train.max_start_gap`.
        storage: how the residual is kept, `residual.storage`.
    """
    if asked is not None:
        return asked
    return LARGEST_GAP_4BIT if storage.startswith("nf4") else LARGEST_GAP


@contextmanager
def base_weights(loaded: AdaptedModel) -> Iterator[None]:
    """Context in which the adapted layers compute with the pre-trained weights instead of their own tensors."""
    layers: list[nn.Module] = []
    wrapped: dict[str, list[Target]] = {}
    try:
        for target in loaded.targets:
            if target.experts and hasattr(loaded.model.get_submodule(target.holder), "base_layer"):
                wrapped.setdefault(target.holder, []).append(target)
                continue
            layer = loaded.model.get_submodule(target.name)
            linear = getattr(layer, "base_layer", layer)  # PEFT's layers have the linear inside

            def forward(x: Tensor, *routes: Routes, target=target, linear=linear) -> Tensor:
                dtype = compute_dtype(x)
                weight = loaded.source.weight(target).to(x.device, dtype)
                if target.experts:
                    return routes[0].times(x.to(dtype), weight)
                return nn.functional.linear(x.to(dtype), weight, linear.bias)

            linear.forward = forward
            layers.append(linear)
            if linear is not layer:
                layer.forward = linear.__call__
                layers.append(layer)
        for holder, targets in wrapped.items():
            layer = loaded.model.get_submodule(holder)
            layer.forward = _with_parameters(loaded, layer, targets)
            layers.append(layer)
        with torch.compiler.set_stance("force_eager"):  # what is compiled knows nothing of these weights
            yield
    finally:
        for layer in layers:
            del layer.forward


def _with_parameters(loaded: AdaptedModel, layer: nn.Module, targets: list[Target]) -> Callable:
    """What the module computes around which PEFT's layers were put, with pre-trained parameters of its experts."""
    module: Any = layer
    while hasattr(module, "base_layer"):
        module = module.base_layer

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves = {target.leaf: target for target in targets}
        own = {leaf: module._parameters[leaf] for leaf in leaves}
        try:
            for leaf, target in leaves.items():
                weight = loaded.source.parameter(target.weight).to(own[leaf].device, own[leaf].dtype)
                module._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
            return module.forward(*args, **kwargs)
        finally:
            module._parameters.update(own)

    return forward


def check_beginning(
    engine: SorsaEngine,
    loaded: AdaptedModel,
    probe: dict[str, Tensor],
    config: RunConfig,
    options: LossOptions,
    sequence: SequenceParallel,
) -> tuple[float, float]:
    """Check at step 0 that the model is causal and is the pre-trained one, and tell both losses. A collective call.

    Args:
        probe: this rank's first micro-batch, the same on all ranks that compute it together.
        options: how the run computes losses.
        sequence: the ranks that compute a sequence together.

    Returns:
        The losses that `check_start` finds.

    Raises:
        ValueError: the model sees tokens that it is to predict, or its loss is not the pre-trained model's.
    """
    with sequence.whole():
        check_causal(engine, probe, engine.device)
    gap = largest_gap(config.train.max_start_gap, config.residual.storage)
    base, start = check_start(engine, loaded, shard(probe, sequence), engine.device, gap, options)
    say(f"Loss at step 0: {start:.6f}; the pre-trained model's: {base:.6f}.")
    return base, start


def check_start(
    engine: nn.Module,
    loaded: AdaptedModel,
    batch: dict[str, Tensor],
    device: torch.device,
    tolerance: float,
    options: LossOptions,
) -> tuple[float, float]:
    """Loss of the pre-trained model and of the adapted one at step 0, nats per token. A collective call.

    Raises:
        ValueError: the two losses differ by more than `tolerance`, relatively.
    """
    with base_weights(loaded):
        base = mean_loss(engine, [batch], device, options)
    start = mean_loss(engine, [batch], device, options)
    if not abs(start - base) <= tolerance * abs(base):
        raise ValueError(
            f"the model's loss at step 0 is {start:.6f}, but the pre-trained model's is {base:.6f}: the adapted "
            f"model does not reproduce it. The largest allowed relative gap is train.max_start_gap={tolerance}; check "
            f"the decomposition and the precision"
        )
    return base, start


@torch.no_grad()
def check_causal(engine: nn.Module, batch: dict[str, Tensor], device: torch.device) -> None:
    """Stop where a model sees the tokens that it is to predict. A collective call.

    Its logits at the beginning of a text must be the same however the text goes on. They are computed for the first
    tokens of an example, and again with other tokens in the later half of these. The median over the positions is
    compared: where tokens are routed to experts, rounding may send one of them elsewhere.

    Args:
        batch: its longest example is taken.

    Raises:
        ValueError: the logits at the beginning of a text change with how the text goes on.
    """
    ids_L = first_tokens(batch).to(device)
    kept = (len(ids_L) + 1) // 2
    other_L = ids_L.clone()
    other_L[kept:] = 0 if ids_L[-1] else 1
    with eval_mode(engine):
        before, after = (
            engine(input_ids=one[None], attention_mask=torch.ones_like(one[None]), use_cache=False)
            .logits[0, :kept]
            .float()
            for one in (ids_L, other_L)
        )
    moved = ((after - before).norm(dim=-1) / before.norm(dim=-1)).median().item()
    moved = max(collectives.gather_lists([moved]))
    if moved > LARGEST_LOOK_AHEAD:
        name = type(model_of(engine)).__name__
        raise ValueError(
            f"{name} sees the tokens that it is to predict: another end of a text moves its logits at "
            f"the beginning by {moved:.0%}. It cannot be trained as a causal language model unless its config.json has "
            f"a setting that makes it one"
        )


def check_packed(engine, batches: BatchPlan, device: torch.device, precision: str, options: LossOptions) -> None:
    """Compare the loss of a packed micro-batch with that of its examples without packing. A collective call.

    Of the first step's micro-batches it is the one in which this rank has most examples, and so most seams.

    What a model's structure does not show is seen here: attention that reaches over the seams, or positions that the
    model does not take from its caller. Nothing happens without packing.

    Args:
        precision: the run's, `train.precision`.

    Raises:
        ValueError: the two losses differ by more than rounding does.
    """
    if batches.packing is None:
        return
    first = batches.packed(0)
    fullest = max(range(len(first)), key=lambda place: sum(map(len, first[place])))
    examples = [example for row in first[fullest] for example in row]
    micro = batches.micro_batch_size
    rounds = math.ceil(max(collectives.gather_lists([len(examples)])) / micro)  # as many forward passes on every rank
    filled = [*examples, *[None] * (rounds * micro - len(examples))]
    alone = [collate(filled[at : at + micro], batches.pad_token_id) for at in range(0, len(filled), micro)]
    packed = mean_loss(engine, batches.micro_batches(0)[fullest : fullest + 1], device, options)
    unpacked = mean_loss(engine, alone, device, options)
    relative, absolute = (1e-4, 0.0) if precision == "fp32" else (1e-2, 1e-2)
    if not math.isclose(packed, unpacked, rel_tol=relative, abs_tol=absolute):
        raise ValueError(
            f"data.packing: the loss of a packed micro-batch is {packed:.6f}, but its examples have "
            f"{unpacked:.6f} without packing: with {type(engine.module).__name__} and this attention kernel the "
            f"examples of a row do not stay apart; set data.packing=false, or loading.attn_implementation=eager"
        )
