"""The initialisation itself: every rank decomposes the layers that it owns, and hands every rank its part.

In each round a rank holds no more than one layer's `working_set` besides its final shards.
"""

import ctypes
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from sorsa_ds.model.init_report import LayerReport
from sorsa_ds.model.pretrained import all_finite
from sorsa_ds.model.schedule import Item, schedule
from sorsa_ds.model.sharding import Part, Placement, TensorSpec
from sorsa_ds.model.targets import Target
from sorsa_ds.model.weight_sources import WeightSource
from sorsa_ds.runtime import collectives
from sorsa_ds.sorsa.decompose import Factors

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
