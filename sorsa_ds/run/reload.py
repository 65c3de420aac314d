"""A trained model, put back together from its base model and an adapter, in the precision in which it was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sorsa_ds.methods.registry import method_of
from sorsa_ds.model import adapter_file
from sorsa_ds.model.fill import RoundProgress
from sorsa_ds.model.load import AdaptedModel, load_adapted_model
from sorsa_ds.model.new_tokens import rows_for
from sorsa_ds.model.numerics import check_numerics
from sorsa_ds.model.pretrained import find_model
from sorsa_ds.model.sharding import Whole
from sorsa_ds.runtime import precision
from sorsa_ds.runtime.console import say
from sorsa_ds.sorsa import residual_storage


def load_adapter(
    folder: Path | str,
    base: str | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The adapted model, ready for inference or further training; with SORSA U, s and V are its trainable parameters.

    Args:
        folder: an adapter (`adapter/` of a run, or an export).
        base: folder or hub name of the base model, if it is no longer where the adapter says.
        device: where the model goes.
        trust_remote_code: allow Python code that comes with the base model, where the adapter was trained with it.

    Raises:
        ValueError: the adapter is missing, damaged, or of another base model, or needs code that is not allowed.
    """
    return reload(Path(folder), torch.device(device), base=base, trust_remote_code=trust_remote_code).model


def reload(
    folder: Path,
    device: torch.device,
    progress: RoundProgress = iter,
    base: str | None = None,
    trust_remote_code: bool = False,
    trained: Callable[[str, torch.Size], Tensor] | None = None,
) -> AdaptedModel:
    """The adapted model of an adapter's folder, and what it was made from. A collective call where there are ranks.

    Args:
        folder: an adapter (`adapter/` of a run, or an export).
        device: where the model goes.
        progress: wraps the rounds in which the model is filled, to show them.
        base: folder or hub name of the base model, if it is no longer where the adapter says.
        trust_remote_code: allow Python code that comes with the base model, where the adapter was trained with it.
        trained: gives the trained tensors, by name and shape; None: those of the folder.

    Raises:
        ValueError: the adapter is missing, damaged, or of another base model, or needs code that is not allowed.
    """
    described = adapter_file.read_description(folder, trust_remote_code)
    place = find_model(base or described.base_model, described.loading)
    check_numerics(described.numerics, place, described.loading, say)
    formats = precision.resolve_precision(described.precision, None, cast(precision.Device, device.type))
    method = method_of(described)
    names = [name for name in method.adapter_files if trained is None or name != adapter_file.TRAINED]
    opened = {name: adapter_file.open_factors(folder, name, described) for name in names}
    operation = method.operation(
        described,
        formats,
        residual_storage.resolve_storage(described.residual, formats, device),
        device,
        initial=adapter_file.file_of(folder, adapter_file.INITIAL),
        trained=trained or opened[adapter_file.TRAINED].values,
    )
    loaded = load_adapted_model(
        place,
        operation,
        loading=described.loading,
        placement=Whole(device),
        device=device,
        dtype=formats.residual_dtype,
        digests=described.digests,
        rows=rows_for(described.new_tokens),
        progress=progress,
    )
    if unchecked := described.unchecked(opened, loaded.digests):
        say(f"{folder}: {unchecked}")
    return loaded
