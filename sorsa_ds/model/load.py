"""From a checkpoint on disk to a SORSA model, sharded as the ZeRO stage wants it; no rank ever holds it whole."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sorsa_ds.config.schema import LoadingConfig, SorsaConfig
from sorsa_ds.model.fill import FactorSource, Progress, Recipe, fill, parameter_homes
from sorsa_ds.model.init_report import LayerReport
from sorsa_ds.model.pretrained import Checkpoint
from sorsa_ds.model.schedule import Item
from sorsa_ds.model.sharding import Part, Placement
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.sorsa_recipe import SorsaRecipe
from sorsa_ds.model.targets import Target, operate, select
from sorsa_ds.model.weight_sources import OnDisk
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.residual_storage import Dense, Storage

Operation = Callable[[PreTrainedModel], tuple[list[Target], Recipe]]
"""Makes a model without memory one that can be fine-tuned: its layers, what is trained, and in which dtypes."""


@dataclass(slots=True)
class Loaded:
    """A model to fine-tune and what it was made from.

    model: the adapted model; with SORSA every parameter but U, s and V is frozen.
    targets: the adapted linears, in module order.
    source: where the pre-trained weights lie.
    exact_factors: this rank's parts of the trained tensors in fp32 where the parameters themselves are rounded
        (precision bf16); empty otherwise.
    reports: how each layer was initialised, on every rank alike.
    digests: of every parameter of the pre-trained model (`sorsa_ds.runtime.digest`), on every rank alike.
    """

    model: PreTrainedModel
    targets: list[Target]
    source: OnDisk
    exact_factors: dict[str, Part]
    reports: list[LayerReport]
    digests: dict[str, str]


def load(
    folder: Path,
    *,
    loading: LoadingConfig,
    sorsa: SorsaConfig,
    precision: Precision,
    placement: Placement,
    device: torch.device,
    factor_source: FactorSource,
    storage: Storage | None = None,
    trained: FactorSource | None = None,
    digests: dict[str, str] | None = None,
    progress: Progress = iter,
) -> Loaded:
    """Build a model without memory for its parameters, operate on it, and fill it. A collective call.

    Args:
        placement: whole on each rank, or cut for ZeRO-3.
        device: where decompositions run.
        factor_source: gives each target's initial factors (`sorsa_ds.model.factor_source`), against which W_r is taken.
        storage: how W_r is kept; None: in the dtype that the precision says.
        trained: gives the factors that the layers get, if training has moved them.
        digests: what the pre-trained parameters' must be, if this model was loaded before.
        progress: wraps the rounds, to show them.

    Raises:
        ValueError: bad model, target, rank or weight; on every rank, with the message of the rank that found it.
    """
    storage = storage or Dense(precision.residual_dtype)

    def operation(model: PreTrainedModel) -> tuple[list[Target], Recipe]:
        targets = select(model, sorsa)
        operate(model, targets, sorsa, precision, storage)
        return targets, SorsaRecipe(model, precision, storage, device, factor_source, trained)

    return load_operated(
        folder, operation, loading=loading, placement=placement, device=device, digests=digests, progress=progress
    )


def load_operated(
    folder: Path,
    operation: Operation,
    *,
    loading: LoadingConfig,
    placement: Placement,
    device: torch.device,
    digests: dict[str, str] | None = None,
    progress: Progress = iter,
) -> Loaded:
    """`load`, for any operation. A collective call."""
    model, source, targets, others, recipe = collectives.together(
        lambda: _prepare(folder, operation, loading, digests or {}), device
    )
    exact, reports = fill(
        model, targets, others, source, recipe=recipe, placement=placement, device=device, progress=progress
    )
    _fill_buffers(model, source, device)
    return Loaded(model, targets, source, exact, reports, dict(collectives.gather_lists([*source.digests.items()])))


def _prepare(
    folder: Path, operation: Operation, loading: LoadingConfig, digests: dict[str, str]
) -> tuple[PreTrainedModel, OnDisk, list[Target], dict[str, torch.Size], Recipe]:
    """The operated model without memory, where its weights lie, its targets, and the shapes of all other parameters."""
    model = skeleton(folder, loading)
    checkpoint = Checkpoint(folder)
    source = OnDisk(checkpoint, checkpoint.parameter_names(model), digests)
    targets, recipe = operation(model)
    inside = {spec.name for target in targets for spec in recipe.specs(Item.of(target))}
    homes = parameter_homes(model)
    others = {name: getattr(*places[0]).shape for name, places in homes.items() if name not in inside}
    return model, source, targets, others, recipe


def _fill_buffers(model: PreTrainedModel, source: OnDisk, device: torch.device) -> None:
    """Buffers are small and on every rank; those that the checkpoint has are read by each."""
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            stored = source.stored.get(full)
            kept = buffer if stored is None else source.checkpoint.read(stored).to(buffer.dtype)
            module._buffers[name] = kept.to(device)
