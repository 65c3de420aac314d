"""Adapt a model that ZeRO-3 has already cut in memory (`deepspeed.zero.Init`), without ever gathering it whole.

For each batch of `world` layers, one all-to-all makes rank i the holder of layer i, all ranks decompose at once, and a
second all-to-all deals the residuals and factors out again as ZeRO-3 blocks. Each weight crosses the wire twice, and
every decomposition is made once.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import nn

from sorsa_ds.config.deepspeed_json import precision_from_json
from sorsa_ds.config.schema import AdapterConfig, ResidualConfig, SorsaConfig
from sorsa_ds.model.factor_source import factor_source
from sorsa_ds.model.fill import RoundProgress, fill_parameters
from sorsa_ds.model.init_report import LayerReport
from sorsa_ds.model.selection import choose
from sorsa_ds.model.sharding import Part, Zero3
from sorsa_ds.model.sorsa_recipe import SorsaRecipe
from sorsa_ds.model.targets import Target, insert_sorsa_layers
from sorsa_ds.model.uneven_calls import set_uneven_leaves
from sorsa_ds.model.weight_sources import ShardedWeightSource
from sorsa_ds.runtime import precision as precisions
from sorsa_ds.runtime.device import this_device
from sorsa_ds.sorsa import residual_storage


@dataclass(slots=True)
class Adaptation:
    """What was done to a model in memory.

    targets: the adapted linears, in module order.
    reports: how each layer was initialised, on every rank alike; `sorsa_ds.model.init_report.table` prints them.
    exact_factors: this rank's parts of U, s and V in fp32 where the parameters themselves are rounded (precision
        bf16), for `sorsa_ds.engine.engine.SorsaEngine`; empty otherwise.
    """

    targets: list[Target]
    reports: list[LayerReport]
    exact_factors: dict[str, Part]


def adapt_partitioned_model(
    model: nn.Module,
    ds_config: dict[str, Any],
    *,
    adapter: AdapterConfig | None = None,
    sorsa: SorsaConfig | None = None,
    residual: ResidualConfig | None = None,
    precision: Literal["auto", "fp32", "mixed", "bf16"] = "auto",
    progress: RoundProgress = iter,
) -> Adaptation:
    """Replace the target linears of a ZeRO-3 model by SORSA layers, in place. A collective call.

    It is for a program of your own that builds its model under `deepspeed.zero.Init`; `launch/train.py` reads the
    weights from disk instead, which needs one exchange less. No rank ever holds more than its own shards and the layer
    that it is decomposing:

        keep = HfDeepSpeedConfig(ds_config)                    # from_pretrained then cuts the model for ZeRO-3
        model = AutoModelForCausalLM.from_pretrained("mistralai/Mistral-7B-v0.1")
        sorsa_ds.adapt_partitioned_model(model, ds_config, adapter=sorsa_ds.AdapterConfig(rank=64))
        trained = [p for p in model.parameters() if p.requires_grad]             # U, s and V of each target
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=ds_config)

    Afterwards the model computes what it computed before, up to rounding and the quantisation of the residual, and
    only U, s and V are trained. Parameters outside the targets, and biases, stay where they are and in their dtype.
    DeepSpeed's own engine trains without the orthonormal regulariser; `sorsa_ds.engine.engine.SorsaEngine` adds it.

    Args:
        ds_config: the DeepSpeed configuration with which the model was cut.
        adapter: targets, rank and scale; None: the defaults (every linear but the output head, rank 16).
        sorsa: how weights are decomposed; None: the defaults.
        residual: how W_r is kept; None: in the dtype that the precision says.
        precision: formats of the new layers, as `train.precision`; `auto`: as ds_config or the hardware says.
        progress: wraps the rounds of the initialisation, to show them.

    Raises:
        ValueError: a parameter is not partitioned, `adapter.train_whole` names modules, a target, rank or weight is
            bad, or precision and residual do not go together.
    """
    adapter, sorsa, residual = adapter or AdapterConfig(), sorsa or SorsaConfig(), residual or ResidualConfig()
    device = this_device()
    _check(model, adapter)
    kind = cast(precisions.Device, device.type)
    formats = precisions.resolve_precision(precision, precision_from_json(ds_config), kind)
    storage = residual_storage.resolve_storage(residual, formats, device)
    targets = choose(model, adapter).targets
    weights = {target.name: model.get_parameter(target.weight) for target in targets}
    biases = {target.name: model.get_submodule(target.name).bias for target in targets if not target.experts}
    bare = [replace(target, bias=False) for target in targets]  # the biases stay in place, so none is made
    insert_sorsa_layers(model, bare, adapter, formats, storage)
    factors = factor_source(sorsa, adapter, residual, storage, formats)
    exact, reports = fill_parameters(
        model, bare, {}, ShardedWeightSource(weights, device),
        recipe=SorsaRecipe(model, formats, storage, device, factors),
        placement=Zero3(ds_config, device), device=device, progress=progress,
    )  # fmt: skip
    set_uneven_leaves(model)
    for name, bias in biases.items():
        model.get_submodule(name).bias = bias
    return Adaptation(targets, reports, exact)


def _check(model: nn.Module, adapter: AdapterConfig) -> None:
    """Stop where the model is not partitioned, or the settings mean nothing for one in memory.

    Raises:
        ValueError: naming the parameter or the setting.
    """
    if adapter.train_whole:
        raise ValueError(
            "adapter.train_whole: a model in memory keeps its other parameters as they are; leave it out, and set "
            "requires_grad of those that are to be trained before the engine is made"
        )
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "ds_tensor"):
            raise ValueError(f"{name} is not partitioned by ZeRO-3; build the model under deepspeed.zero.Init")
