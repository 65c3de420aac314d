"""SORSA, and what it is compared with: one trainer, one engine, one checkpoint for all.

A method says two things: what it makes of a model without memory (`operation`: its layers, what is trained, and what
each rank's share of the tensors is made from), and which engine takes its steps (`engine`). Everything else is alike.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel

from sorsa_ds.config.schema import BaselineConfig, MethodName, ResidualConfig, RunConfig, SorsaConfig
from sorsa_ds.methods import settings, whole_weights
from sorsa_ds.methods.peft_layers import PeftLayers, PeftRecipe, Values
from sorsa_ds.model import factor_source as factors
from sorsa_ds.model import fill, pretrained, sorsa_recipe
from sorsa_ds.model.adapter_file import FactorFile
from sorsa_ds.model.fill import Recipe
from sorsa_ds.model.load import Operation
from sorsa_ds.model.sorsa_recipe import SorsaRecipe
from sorsa_ds.model.targets import Target, operate, select
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.regularizer import Regularizer
from sorsa_ds.sorsa.residual_storage import Storage, describe_storage

METHODS = {
    "sorsa": "SORSA", "lora": "LoRA", "pissa": "PiSSA", "adalora": "AdaLoRA", "dora": "DoRA", "olora": "OLoRA",
    "full": "full fine-tuning", "partial": "partial fine-tuning",
}  # fmt: skip
"""Their names in text."""


class Settings(Protocol):
    """What of a run's settings, or of an adapter's description, a method needs."""

    method: MethodName
    sorsa: SorsaConfig
    baseline: BaselineConfig
    residual: ResidualConfig


def operation(
    chosen: Settings,
    precision: Precision,
    storage: Storage,
    device: torch.device,
    *,
    seed: int = 0,
    initial: Path | None = None,
    trained: Values | None = None,
) -> Operation:
    """What the method makes of a model.

    Args:
        storage: how SORSA's residual is kept.
        device: where decompositions run.
        seed: of what is drawn at the start.
        initial: the file of tensors with which training began, where it has begun.
        trained: gives the tensors as training has left them.
    """
    begun = FactorFile(initial) if initial is not None and keeps_initial(chosen.method) else None

    def sorsa(model: PreTrainedModel) -> tuple[list[Target], Recipe]:
        targets = select(model, chosen.sorsa)
        operate(model, targets, chosen.sorsa, precision, storage)
        if begun is not None:
            source = factors.from_values(begun.values)
        else:
            source = factors.factor_source(chosen.sorsa, chosen.residual, storage, precision)
        now = None if trained is None else factors.from_values(trained)
        return targets, SorsaRecipe(model, precision, storage, device, source, now)

    def peft(model: PreTrainedModel) -> tuple[list[Target], Recipe]:
        layers = PeftLayers(chosen.method, chosen.sorsa, chosen.baseline, seed)
        targets = layers.operate(model, precision)
        return targets, PeftRecipe(layers, model, precision, device, begun and begun.values, trained)

    def weights(model: PreTrainedModel) -> tuple[list[Target], Recipe]:
        targets = whole_weights.operate(model, chosen.sorsa if chosen.method == "partial" else None, precision)
        return targets, whole_weights.WeightsRecipe.of(model, precision, trained)

    if chosen.method == "sorsa":
        return sorsa
    return peft if chosen.method in settings.ADAPTERS else weights


def working_set(chosen: Settings, targets: list[Target], largest: int, storage: Storage) -> int:
    """Bytes that a rank holds at most besides its final shards while its part of the model is made.

    Args:
        largest: numbers of the largest parameter.
    """
    if chosen.method == "sorsa":
        refined = chosen.residual.iterations > 1
        return max(sorsa_recipe.working_set(target, chosen.sorsa, storage, refined) for target in targets)
    made = 8 * largest  # as it is read, and its message
    if chosen.method in settings.ADAPTERS:
        layers = PeftLayers(chosen.method, chosen.sorsa, chosen.baseline)
        made = max(made, *(layers.working_set(target) for target in targets))
    return made + fill.TRIM_BYTES + pretrained.REOPEN_BYTES


def keeps_initial(method: MethodName) -> bool:
    """Whether a run keeps the tensors with which it began: whole weights are the base model's own."""
    return method not in ("full", "partial")


def engine(config: RunConfig, steps: int) -> Callable:
    """What makes the engine, called as `SorsaEngine` is.

    Args:
        steps: optimizer steps of the run.

    Raises:
        ValueError: the steps leave no room for AdaLoRA's schedule.
    """
    from sorsa_ds.engine.engine import SorsaEngine

    if config.method != "adalora":
        return SorsaEngine
    from sorsa_ds.methods.adalora import AdaLoraEngine, schedule

    return partial(AdaLoraEngine, config=schedule(config, steps))


def describe(config: RunConfig, targets: list[Target], trained: int, reg: Regularizer | None) -> list[tuple[str, str]]:
    """Rows on what is trained, and against how much of SORSA's.

    Args:
        trained: the number of trained parameters.
        reg: SORSA's regulariser.
    """
    rows = [("method", config.method)]
    if reg is not None:
        return [
            *rows,
            ("trained", f"{len(targets)} linears adapted, {trained:,} parameters"),
            ("residual", describe_storage(config.residual)),
            ("regulariser", f"{reg.form}, {reg.reduction}, gamma / eta_d = {reg.coefficient:.4g}{reg.rhythm()}"),
        ]
    where = f"{len(targets)} linears" if targets else "every parameter"
    rows.append(("trained", f"{where}, {trained:,} parameters"))
    if config.method in settings.ADAPTERS:
        ours = sum(target.trainable for target in targets)
        rows.append(("for comparison", f"SORSA at this rank trains r (m + n + 1): {ours:,}, {_more(ours - trained)}"))
    return rows


def _more(difference: int) -> str:
    return "as many" if difference == 0 else f"{abs(difference):,} {'more' if difference > 0 else 'fewer'}"
