"""SORSA models as tests need them: loaded with given factors, and looked at layer by layer."""

from pathlib import Path

import torch
from torch import nn

from sorsa_ds.config.schema import AdapterConfig, LoadingConfig
from sorsa_ds.model.fill import FactorSource
from sorsa_ds.model.load import AdaptedModel, load_adapted_model
from sorsa_ds.model.sharding import Placement
from sorsa_ds.model.sorsa_recipe import adapt_to_sorsa
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.residual_storage import Dense, Storage


def load_sorsa_model(
    folder: Path,
    *,
    adapter: AdapterConfig,
    precision: Precision,
    placement: Placement,
    device: torch.device,
    factor_source: FactorSource,
    storage: Storage | None = None,
) -> AdaptedModel:
    """A SORSA model with the factors of a source. A collective call.

    Args:
        storage: how W_r is kept; None: in the dtype that the precision says.
    """
    kept = storage or Dense(precision.residual_dtype)
    return load_adapted_model(
        folder,
        lambda model: adapt_to_sorsa(model, adapter, precision, kept, device, factor_source),
        loading=LoadingConfig(),
        placement=placement,
        device=device,
        dtype=precision.residual_dtype,
    )


def sorsa_layers(model: nn.Module) -> dict[str, SorsaLinear]:
    """The SORSA layers of a model by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SorsaLinear)}
