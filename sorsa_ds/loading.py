"""From a checkpoint on disk to a SORSA model, sharded as the ZeRO stage wants it; no rank ever holds the whole model.

The model is built without memory for its parameters. Then, in rounds, each rank reads the tensors that it owns, one
item at a time, decomposes them if they are targets, and hands every rank its part. On ZeRO-3 a rank holds its final
shards, and besides at most one layer with its factors, the same again on the wire, and one parameter's empty frame.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sorsa_ds import comm
from sorsa_ds.config import LoadingConfig, SorsaConfig
from sorsa_ds.decompose import Factors, decompose, residual
from sorsa_ds.ownership import Item, schedule
from sorsa_ds.placement import Part, Placement, TensorSpec
from sorsa_ds.precision import Precision
from sorsa_ds.surgery import Target, operate, select
from sorsa_ds.weights import Checkpoint

FactorSource = Callable[[Target, Tensor], Factors]
"""Gives a target's factors from its weight (M, N): by decomposition, or from a file."""


@dataclass(slots=True)
class Loaded:
    """A SORSA model and what it was made from.

    model: the adapted model; every parameter but U, s and V is frozen.
    targets: the adapted linears, in module order.
    checkpoint, stored: where the pre-trained weights lie, and under which names.
    exact_factors: this rank's parts of U, s and V in fp32 where the parameters themselves are rounded (precision
        bf16); empty otherwise.
    """

    model: PreTrainedModel
    targets: list[Target]
    checkpoint: Checkpoint
    stored: dict[str, str]
    exact_factors: dict[str, Part] = field(default_factory=dict)

    def base_weight(self, target: Target) -> Tensor:
        """The target's pre-trained weight (M, N) as the checkpoint has it, on the CPU."""
        weight = self.checkpoint.read(self.stored[target.name + ".weight"])
        return weight.t() if target.transposed else weight


def skeleton(folder: Path | str, loading: LoadingConfig, **changes) -> PreTrainedModel:
    """The model without memory for its parameters; buffers (rotary frequencies) are real.

    Raises:
        ValueError: the folder's configuration is not one of a causal language model.
    """
    attention = None if loading.attn_implementation == "auto" else loading.attn_implementation
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=loading.trust_remote_code, **changes)
        if getattr(config, "rescale_every", 0):
            # RWKV halves its output projections in place every few layers at inference, an fp16 range trick that
            # changes nothing else; SORSA's layers have no such weight to halve.
            config.rescale_every = 0
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, trust_remote_code=loading.trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model: {folder} cannot be built as a causal language model: {error}") from error
    model.tie_weights()
    return model


def load(
    folder: Path,
    *,
    loading: LoadingConfig,
    sorsa: SorsaConfig,
    precision: Precision,
    placement: Placement,
    device: torch.device,
    factor_source: FactorSource | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda rounds, total: rounds,
) -> Loaded:
    """Build, operate and fill a model. A collective call.

    Args:
        placement: whole on each rank, or cut for ZeRO-3.
        device: where decompositions run.
        factor_source: replaces the decomposition, for example by the factors of a finished run.
        progress: wraps the rounds, to show them.

    Raises:
        ValueError: bad model, target, rank or weight; on every rank, with the message of the rank that found it.
    """
    model = skeleton(folder, loading)
    checkpoint = Checkpoint(folder)
    stored = checkpoint.parameter_names(model)
    targets = select(model, sorsa)
    operate(
        model,
        targets,
        dropout=sorsa.dropout,
        alpha=sorsa.alpha,
        residual_dtype=precision.residual_dtype,
        factor_dtype=precision.factor_dtype,
    )
    model.tie_weights()
    loaded = Loaded(model, targets, checkpoint, stored)
    factor_source = factor_source or (lambda target, weight: decompose(weight, target.rank, target.name))

    homes = _homes(model)
    items = _items(model, targets, homes)
    rounds = schedule(items, comm.world_size())
    for items_of_round in progress(rounds, len(rounds)):
        specs = [_specs(item, model, precision) if item else [] for item in items_of_round]
        mine, error = [], None
        try:
            if (item := items_of_round[comm.rank()]) is not None:
                mine = _produce(item, loaded, precision, device, factor_source)
        except Exception as caught:
            error = caught
        comm.agree(error, device)
        parts = placement.distribute(specs, mine)
        for spec in (spec for some in specs for spec in some):
            _place(loaded, homes[spec.name], spec, parts[spec.name], placement, precision)
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(checkpoint.read(stored[name]))
    model.to(device) if not any(hasattr(p, "ds_id") for p in model.parameters()) else _move_buffers(model, device)
    return loaded


def _homes(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """First name of each parameter -> every (module, attribute) that holds it; more than one where it is tied."""
    first: dict[int, str] = {}
    homes: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = first.setdefault(id(parameter), f"{prefix}.{attribute}" if prefix else attribute)
            homes.setdefault(name, []).append((module, attribute))
    return homes


def _items(model: nn.Module, targets: list[Target], homes: dict) -> list[Item]:
    """The loading work: one item a target, one a parameter outside the targets."""
    inside = {f"{t.name}.{leaf}" for t in targets for leaf in ("residual", "U", "s", "V", "bias")}
    items = [Item(t.name, torch.Size((t.out_features, t.in_features)), t) for t in targets]
    items += [Item(name, getattr(*places[0]).shape, None) for name, places in homes.items() if name not in inside]
    return items


def _specs(item: Item, model: nn.Module, precision: Precision) -> list[TensorSpec]:
    """The tensors of an item, as they cross the wire: factors in fp32 whatever the parameters' dtype."""
    target = item.target
    if target is None:
        return [TensorSpec(item.name, item.shape, precision.residual_dtype)]
    m, n, r = target.out_features, target.in_features, target.rank
    specs = [TensorSpec(f"{target.name}.residual", torch.Size((m, n)), precision.residual_dtype)]
    for leaf, shape in (("U", (m, r)), ("s", (r,)), ("V", (n, r))):
        specs.append(TensorSpec(f"{target.name}.{leaf}", torch.Size(shape), torch.float32))
    if target.bias:
        specs.append(TensorSpec(f"{target.name}.bias", torch.Size((m,)), precision.residual_dtype))
    return specs


def _produce(
    item: Item, loaded: Loaded, precision: Precision, device: torch.device, factor_source: FactorSource
) -> list[Tensor]:
    """The owner's work: read, and for a target decompose. Tensors in the order of `_specs`."""
    if item.target is None:
        return [loaded.checkpoint.read(loaded.stored[item.name]).to(device, precision.residual_dtype)]
    target = item.target
    weight = loaded.base_weight(target).to(device)
    factors = factor_source(target, weight)
    scale = loaded.model.get_submodule(target.name).scale
    rest = residual(
        weight, factors, used_dtype=precision.compute_dtype, scale_dtype=precision.factor_dtype, scale=scale
    )
    tensors = [rest.to(precision.residual_dtype), factors.U, factors.s, factors.V]
    if target.bias:
        tensors.append(loaded.checkpoint.read(loaded.stored[target.name + ".bias"]).to(device))
    return tensors


def _place(
    loaded: Loaded, homes: list, spec: TensorSpec, part: Part, placement: Placement, precision: Precision
) -> None:
    """Put a part into the model, in every module that holds the parameter."""
    old = getattr(*homes[0])
    if old.requires_grad and old.dtype != spec.dtype:
        loaded.exact_factors[spec.name] = part
    dtype = old.dtype if old.requires_grad else precision.residual_dtype
    parameter = placement.parameter(spec, part, dtype, trainable=old.requires_grad)
    for module, attribute in homes:
        module.register_parameter(attribute, parameter)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
