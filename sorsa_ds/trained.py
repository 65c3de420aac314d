"""A trained model, put back together from its base model and an adapter, in the precision in which it was trained."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from sorsa_ds import adapter, precision, residual
from sorsa_ds.initialize import Progress
from sorsa_ds.inputs import find_model
from sorsa_ds.loading import Loaded, load
from sorsa_ds.placement import Whole


def load_adapter(folder: Path | str, base: str | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The adapted model, ready for inference or further training: U, s and V are its trainable parameters.

    Args:
        folder: an adapter (`adapter/` of a run, or an export).
        base: folder or hub name of the base model, where it is no longer the one that the adapter names.
        device: where the model goes.

    Raises:
        ValueError: the adapter is missing, damaged, or of another base model.
    """
    return reload(Path(folder), torch.device(device), base=base).model


def reload(folder: Path, device: torch.device, progress: Progress = iter, base: str | None = None) -> Loaded:
    """The same, with all that is known of it; `progress` wraps the rounds. A collective call where there are ranks."""
    described = adapter.read_description(folder)
    formats = precision.choose(described.precision, None, device.type)
    return load(
        find_model(base or described.base_model, described.loading),
        loading=described.loading,
        sorsa=described.sorsa,
        precision=formats,
        storage=residual.choose(described.residual, formats, device),
        placement=Whole(device),
        device=device,
        factor_source=adapter.open_factors(folder, adapter.INITIAL, described),
        trained=adapter.open_factors(folder, adapter.TRAINED, described),
        digests=described.digests,
        progress=progress,
    )
