"""Adapt a model that ZeRO-3 has already cut in memory (`deepspeed.zero.Init`), without ever gathering it.

For each batch of `world` layers, one all-to-all makes rank i the holder of layer i, all ranks decompose at once, and a
second all-to-all deals the residuals and factors out again as ZeRO-3 blocks: each weight crosses the wire twice, every
decomposition is made once.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from sorsa_ds.config.schema import SorsaConfig
from sorsa_ds.model.fill import FactorSource, Progress, fill
from sorsa_ds.model.init_report import LayerReport
from sorsa_ds.model.sharding import Part, Zero3
from sorsa_ds.model.sorsa_recipe import SorsaRecipe
from sorsa_ds.model.targets import Target, operate, select
from sorsa_ds.model.weight_sources import InShards
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.residual_storage import Dense, Storage


@dataclass(slots=True)
class Adopted:
    """What was done to the model: its targets, a report of each, and the fp32 factors where parameters are rounded."""

    targets: list[Target]
    reports: list[LayerReport]
    exact_factors: dict[str, Part]


def adopt(
    model: nn.Module,
    ds_config: dict,
    *,
    sorsa: SorsaConfig,
    precision: Precision,
    device: torch.device,
    factor_source: FactorSource,
    storage: Storage | None = None,
    progress: Progress = iter,
) -> Adopted:
    """Swap the targets of a partitioned model for SORSA layers, in place. A collective call.

    Args:
        ds_config: the resolved DeepSpeed configuration that the model was partitioned with.
        precision: the formats of the new layers; other parameters stay as they are.
        storage: how W_r is kept; None: in the dtype that the precision says.

    Raises:
        ValueError: a parameter is not partitioned; bad targets, ranks or weights.
    """
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "ds_tensor"):
            raise ValueError(f"{name} is not partitioned by ZeRO-3; build the model under deepspeed.zero.Init")
    targets = select(model, sorsa)
    linears = {target.name: model.get_submodule(target.name) for target in targets}
    biases = {name: linear.bias for name, linear in linears.items()}
    bare = [replace(target, bias=False) for target in targets]  # biases are in place already
    storage = storage or Dense(precision.residual_dtype)
    operate(model, bare, sorsa, precision, storage)
    exact, reports = fill(
        model,
        bare,
        {},
        InShards(linears, device),
        recipe=SorsaRecipe(model, precision, storage, device, factor_source),
        placement=Zero3(ds_config, device),
        device=device,
        progress=progress,
    )
    for name, bias in biases.items():
        model.get_submodule(name).bias = bias
    return Adopted(targets, reports, exact)
