"""The initialisation itself: every rank decomposes the layers that it owns, and hands every rank its part.

In each round a rank holds no more than one layer's `working_set` besides its final shards.
"""

import ctypes
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sorsa_ds.config.schema import SorsaConfig
from sorsa_ds.model.init_report import LayerReport, QuantisationLoss
from sorsa_ds.model.pretrained import REOPEN_BYTES, all_finite
from sorsa_ds.model.schedule import Item, schedule
from sorsa_ds.model.sharding import Part, Placement, TensorSpec
from sorsa_ds.model.targets import Target
from sorsa_ds.model.weight_sources import WeightSource
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.precision import Precision, full_fp32_products
from sorsa_ds.sorsa import truncated_svd
from sorsa_ds.sorsa.decompose import Decomposition, Factors, residual
from sorsa_ds.sorsa.residual_storage import Storage

FactorSource = Callable[[Target, Tensor], Factors]
"""Gives a target's factors from its weight (M, N): by decomposition, from a cache, or from a finished run."""

Progress = Callable[[list[list[Item | None]]], Iterable[list[Item | None]]]
"""Wraps the plan (`sorsa_ds.model.schedule.schedule`), to show it and how far it is."""

Tensors = tuple[list[Tensor], list[LayerReport]]
"""What an owner has made of an item, and what is to be told of it."""


class Recipe(Protocol):
    """What the items of a model become, in one way of fine-tuning it (`sorsa_ds.methods`)."""

    def specs(self, item: Item) -> list[TensorSpec]:
        """The tensors of an item, as they cross the wire: trained ones in fp32 whatever the parameters' dtype."""

    def produce(self, item: Item, source: WeightSource) -> Tensors:
        """The owner's work: the tensors in the order of `specs`, from the item's pre-trained weight.

        Raises:
            ValueError: a bad weight.
        """


TRIM_BYTES = 2**26
"""So many bytes of tensors may pass through a rank before it returns what it freed."""


def fill(
    model: nn.Module,
    targets: list[Target],
    others: dict[str, torch.Size],
    source: WeightSource,
    *,
    recipe: Recipe,
    placement: Placement,
    device: torch.device,
    progress: Progress,
) -> tuple[dict[str, Part], list[LayerReport]]:
    """Give every parameter of an operated model its values. A collective call.

    Args:
        others: the parameters outside the targets that `source` has too, with their shapes.

    Returns:
        (this rank's exact fp32 parts of the trained tensors whose parameters are rounded, a report of every layer).

    Raises:
        ValueError: a bad weight; on every rank, with the message of the rank that found it (there: PeerError).
    """
    homes = parameter_homes(model)
    exact: dict[str, Part] = {}
    mine: list[LayerReport] = []
    items = [Item.of(target) for target in targets]
    items += [Item(name, shape, None) for name, shape in others.items()]
    rounds = schedule(items, collectives.world_size())
    passed = 0
    for owned in progress(rounds):
        source.exchange(owned)
        item = owned[collectives.rank()]
        tensors, report = collectives.together(
            lambda item=item: ([], []) if item is None else recipe.produce(item, source), device
        )
        mine += report
        specs = [recipe.specs(one) if one else [] for one in owned]
        parts = placement.distribute(specs, tensors)
        for spec in (spec for some in specs for spec in some):
            _place(homes[spec.name], spec, parts.pop(spec.name), placement, exact)
        del parts
        passed += sum(spec.shape.numel() * spec.dtype.itemsize for some in specs for spec in some)
        if passed >= TRIM_BYTES:
            return_freed_memory()
            passed = 0
    order = {target.name: i for i, target in enumerate(targets)}
    return exact, sorted(collectives.gather_lists(mine), key=lambda report: order[report.name])


def working_set(target: Target, sorsa: SorsaConfig, storage: Storage, refined: bool = False) -> int:
    """Bytes that a rank holds at most besides its final shards while this layer is made.

    Two fp32 matrices of the layer's size with its factors: weight and residual while it is decomposed, the outgoing and
    the incoming message while it is exchanged; what the decomposition itself takes (`lowrank.search_bytes`); and what
    was read or freed but not yet returned to the system. A quantised residual is made dense once more, to see what it
    has lost; with several rounds (`refined`) that is decomposed, beside the weight.
    """
    m, n = target.out_features, target.in_features
    tall = max(m, n), min(m, n), target.rank, sorsa.svd_tolerance
    iterate = sorsa.svd == "randomized" and not truncated_svd.prefers_exact(*tall)
    more = 4 * m * n * (storage.quantised + refined)
    return (
        8 * (m * n + target.trainable) + more + truncated_svd.search_bytes(*tall, iterate) + TRIM_BYTES + REOPEN_BYTES
    )


def return_freed_memory() -> None:
    """Let the C library give back what was freed: between the shards that stay it would keep up to a second model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def parameter_homes(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """First name of each parameter -> every (module, attribute) that holds it; more than one where it is tied."""
    first: dict[int, str] = {}
    homes: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = first.setdefault(id(parameter), f"{prefix}.{attribute}" if prefix else attribute)
            homes.setdefault(name, []).append((module, attribute))
    return homes


@dataclass(frozen=True, slots=True)
class SorsaRecipe:
    """SORSA's: of a target the residual, as it is kept, U, s, V and the bias; everything else as it is.

    Args:
        model: the operated one, whose layers know their scale.
        storage: how the residuals are kept.
        device: where decompositions run.
        factor_source: gives the initial factors, against which the residual is taken.
        trained: gives the factors that the layers get instead, if training has moved them.
    """

    model: nn.Module
    precision: Precision
    storage: Storage
    device: torch.device
    factor_source: FactorSource
    trained: FactorSource | None = None

    def specs(self, item: Item) -> list[TensorSpec]:
        target, dtype = item.target, self.precision.residual_dtype
        if target is None:
            return [TensorSpec(item.name, item.shape, dtype)]
        m, n, r = target.out_features, target.in_features, target.rank
        kept = self.storage.tensors(torch.Size((m, n)))
        specs = [TensorSpec(f"{target.name}.{leaf}", shape, kind) for leaf, (shape, kind) in kept.items()]
        for leaf, shape in (("U", (m, r)), ("s", (r,)), ("V", (n, r))):
            specs.append(TensorSpec(f"{target.name}.{leaf}", torch.Size(shape), torch.float32, trainable=True))
        if target.bias:
            specs.append(TensorSpec(f"{target.name}.bias", torch.Size((m,)), dtype))
        return specs

    def produce(self, item: Item, source: WeightSource) -> Tensors:
        began = time.perf_counter()
        weight, bias = source.read(item)
        weight = weight.to(self.device)
        target = item.target
        if target is None:
            return [checked(item.name, weight)], []
        with full_fp32_products():
            factors = self.factor_source(target, weight)
            rest = residual(
                weight,
                factors,
                used_dtype=self.precision.compute_dtype,
                scale_dtype=self.precision.factor_dtype,
                scale=self.model.get_submodule(target.name).scale,
            )
        now = factors if self.trained is None else self.trained(target, weight)
        packed = self.storage.pack(rest)
        tensors = [*packed, now.U, now.s, now.V]
        if bias is not None:
            tensors.append(bias.to(self.device))
        if not isinstance(factors, Decomposition):
            return tensors, []  # given, not found: nothing to report
        loss = None
        if self.storage.quantised:
            loss = QuantisationLoss.of(self.storage, weight, rest, packed)
        return tensors, [
            LayerReport.of(target, factors, collectives.rank(), time.perf_counter() - began, tensors, loss)
        ]


def checked(name: str, weight: Tensor) -> Tensor:
    """The weight itself.

    Raises:
        ValueError: it holds NaN or Inf.
    """
    if not all_finite(weight):
        raise ValueError(f"{name}: the pre-trained parameter holds NaN or Inf")
    return weight


def _place(
    homes: list[tuple[nn.Module, str]],
    spec: TensorSpec,
    part: Part,
    placement: Placement,
    exact: dict[str, Part],
) -> None:
    """Put a part into the model, in every module that holds the parameter."""
    old = getattr(*homes[0])
    assert spec.trainable == old.requires_grad, f"{spec.name}: recipe and model differ on whether it is trained"
    if spec.trainable and old.dtype != spec.dtype:
        exact[spec.name] = Part(part.start, part.values.clone())  # the part itself is a view of the whole message
    dtype = old.dtype if spec.trainable else spec.dtype
    parameter = placement.parameter(spec, part, dtype)
    for module, attribute in homes:
        module.register_parameter(attribute, parameter)
