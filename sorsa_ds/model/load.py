"""From pre-trained weights on disk to a model ready for fine-tuning, sharded as its ZeRO stage asks.

No rank ever holds the whole model, unless the stage wants it whole on every rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.model.fill import Recipe, RoundProgress, fill_parameters, parameter_homes
from sorsa_ds.model.init_report import LayerReport
from sorsa_ds.model.new_tokens import grow_tables
from sorsa_ds.model.schedule import Item
from sorsa_ds.model.selection import Selection
from sorsa_ds.model.sharding import Part, Placement
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.targets import Target
from sorsa_ds.model.weight_sources import DiskWeightSource
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.device import return_cached_memory

AdaptModel = Callable[[PreTrainedModel], tuple[Selection, Recipe]]
"""Turns a model without memory into one that can be fine-tuned: replaces its layers, and says which are adapted and
what each rank makes their tensors from."""


@dataclass(slots=True)
class AdaptedModel:
    """A model to fine-tune, and what it was made from.

    model: the adapted model; with SORSA every parameter but U, s and V is frozen.
    selection: the adapted linears, in module order, and those that are left out.
    source: where the pre-trained weights lie.
    exact_factors: this rank's parts of the trained tensors in fp32 where the parameters themselves are rounded
        (precision bf16); empty otherwise.
    reports: how each layer was initialised, on every rank alike.
    digests: the digest of every parameter of the pre-trained model, by its name (`sorsa_ds.runtime.digest`), on every
        rank alike.
    """

    model: PreTrainedModel
    selection: Selection
    source: DiskWeightSource
    exact_factors: dict[str, Part]
    reports: list[LayerReport]
    digests: dict[str, str]

    @property
    def targets(self) -> list[Target]:
        """The adapted linears, in module order."""
        return self.selection.targets


def load_adapted_model(
    folder: Path,
    adapt: AdaptModel,
    *,
    loading: LoadingConfig,
    placement: Placement,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    digests: dict[str, str] | None = None,
    rows: int = 0,
    progress: RoundProgress = iter,
) -> AdaptedModel:
    """Build a model without memory for its parameters, adapt it, and fill it. A collective call.

    Args:
        adapt: what the method of fine-tuning makes of the model (`sorsa_ds.methods`).
        placement: whole on each rank, or cut for ZeRO-3.
        device: where decompositions run.
        dtype: the run's dtype, in which buffers that are not stored are made, such as the scale of Gemma's embeddings
            (see `skeleton`). The parameters have the dtypes of the recipe.
        digests: what the digests of the pre-trained parameters must be, if this model was loaded before.
        rows: the least number of rows that embeddings and head get, for new tokens (`sorsa_ds.model.new_tokens`).
        progress: wraps the rounds, to show them.

    Raises:
        ValueError: bad model, target, rank or weight; on every rank, with the message of the rank that found it.
    """
    prepared = collectives.together(lambda: _prepare(folder, adapt, loading, dtype, digests or {}, rows), device)
    assert prepared is not None  # every rank has acted
    model, source, selection, others, recipe = prepared
    exact, reports = fill_parameters(
        model, selection.targets, others, source, recipe=recipe, placement=placement, device=device, progress=progress
    )
    _fill_buffers(model, source, device)
    return_cached_memory(device)  # decompositions leave blocks of sizes that training does not ask for
    read = dict(collectives.gather_lists([*source.digests.items()]))
    return AdaptedModel(model, selection, source, exact, reports, read)


def _prepare(
    folder: Path, adapt: AdaptModel, loading: LoadingConfig, dtype: torch.dtype, digests: dict[str, str], rows: int
) -> tuple[PreTrainedModel, DiskWeightSource, Selection, dict[str, torch.Size], Recipe]:
    """The adapted model without memory, where its weights lie, its targets, and the shapes of all other parameters."""
    model = skeleton(folder, loading, dtype)
    # First, because the weights are found by the names that parameters have before the targets are replaced.
    source = DiskWeightSource.of_model(folder, model, digests)
    grow_tables(model, rows)
    selection, recipe = adapt(model)
    inside = {spec.name for target in selection.targets for spec in recipe.specs(Item.of(target))}
    homes = parameter_homes(model)
    others = {name: getattr(*places[0]).shape for name, places in homes.items() if name not in inside}
    return model, source, selection, others, recipe


def _fill_buffers(model: PreTrainedModel, source: DiskWeightSource, device: torch.device) -> None:
    """Give the model its buffers: they are small, so every rank reads those that are stored, and holds all."""
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            origin = source.origins.get(full)
            kept = buffer if origin is None else source.pretrained.parameter(origin).to(buffer.dtype)
            module._buffers[name] = kept.to(device)
