"""The initialisation itself: every rank makes the layers that it owns, and hands every rank its part of them.

In each round a rank holds no more than one layer's `working_set` besides its final shards.
"""

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from sorsa_ds.model.init_report import LayerReport
from sorsa_ds.model.pretrained import REOPEN_BYTES, all_finite
from sorsa_ds.model.schedule import Item, schedule
from sorsa_ds.model.sharding import Part, Placement, TensorSpec
from sorsa_ds.model.targets import Target
from sorsa_ds.model.weight_sources import WeightSource
from sorsa_ds.runtime import collectives
from sorsa_ds.sorsa.decompose import Factors


class FactorSource(Protocol):
    """Gives a target's factors from its weight (M, N): by decomposition, from a cache, or from a finished run."""

    def __call__(self, target: Target, weight: Tensor, digest: str | None = None, /) -> Factors:
        """The factors.

        Args:
            weight: (M, N), or (E, M, N) where the target is one of experts.
            digest: the digest of the parameter that the weight is a view of; None where none was taken when it was
                read.
        """


RoundProgress = Callable[[list[list[Item | None]]], Iterable[list[Item | None]]]
"""Wraps the rounds (`sorsa_ds.model.schedule.schedule`), to show them and how far they are."""

Produced = tuple[list[Tensor], list[LayerReport]]
"""The tensors that an owner has made of an item, and the reports on its layer."""


class Recipe(Protocol):
    """How one method of fine-tuning (`sorsa_ds.methods`) makes a model's new tensors from its pre-trained ones."""

    def specs(self, item: Item) -> list[TensorSpec]:
        """The tensors that an item becomes, as they cross the wire: trained ones in fp32 whatever the parameters' dtype
        is."""

    def produce(self, item: Item, source: WeightSource) -> Produced:
        """Make the tensors of an item from its pre-trained weight, in the order of `specs`. Only the owner calls it.

        Raises:
            ValueError: the weight holds NaN or Inf, or cannot be read.
        """


TRIM_BYTES = 2**26
"""Number of bytes of tensors that may pass through a rank before it returns what it freed to the system."""


def fill_parameters(
    model: nn.Module,
    targets: list[Target],
    others: dict[str, torch.Size],
    source: WeightSource,
    *,
    recipe: Recipe,
    placement: Placement,
    device: torch.device,
    progress: RoundProgress,
) -> tuple[dict[str, Part], list[LayerReport]]:
    """Give every parameter of an adapted model its values. A collective call.

    Args:
        others: the parameters outside the targets that `source` has too, with their shapes.

    Returns:
        (this rank's exact fp32 parts of the trained tensors whose parameters are rounded, a report of every layer).

    Raises:
        ValueError: a weight holds NaN or Inf, or cannot be read. The other ranks raise PeerError with its message.
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
        produced = collectives.together(partial(_produce, recipe, item, source), device)
        assert produced is not None  # every rank has acted
        tensors, report = produced
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
    reports = map(LayerReport.from_json, collectives.gather_lists([asdict(report) for report in mine]))
    return exact, sorted(reports, key=lambda report: order[report.name])


def reading_bytes(largest: int, made: int = 0) -> int:
    """Bytes of a rank that reads parameters of at most `largest` numbers and makes layers of at most `made` bytes.

    A parameter is there as it is read, and once more as the message to the other ranks.
    """
    return max(8 * largest, made) + TRIM_BYTES + REOPEN_BYTES


def return_freed_memory() -> None:
    """Let the C library return freed memory to the system.

    It would keep the gaps between the shards that stay, in all up to the size of the model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def parameter_homes(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Map the first name of each parameter to every (module, attribute) that holds it: several where it is tied."""
    first: dict[int, str] = {}
    homes: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = first.setdefault(id(parameter), f"{prefix}.{attribute}" if prefix else attribute)
            homes.setdefault(name, []).append((module, attribute))
    return homes


def check_finite(name: str, weight: Tensor) -> Tensor:
    """Return the weight if all its numbers are finite.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    if not all_finite(weight):
        raise ValueError(f"{name}: the pre-trained parameter holds NaN or Inf")
    return weight


def _produce(recipe: Recipe, item: Item | None, source: WeightSource) -> Produced:
    """What this rank makes in a round, which is nothing where it owns no item."""
    return ([], []) if item is None else recipe.produce(item, source)


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
