"""Full fine-tuning, and partial: the whole weights of some linears. No layer is changed."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from sorsa_ds.config.schema import SorsaConfig
from sorsa_ds.methods.peft_layers import Values
from sorsa_ds.model.fill import Produced, check_finite
from sorsa_ds.model.schedule import Item
from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.model.targets import Target, select_targets
from sorsa_ds.model.weight_sources import WeightSource
from sorsa_ds.runtime.precision import Precision


def operate(model: PreTrainedModel, sorsa: SorsaConfig | None, precision: Precision) -> list[Target]:
    """Say what is trained of a model without memory: the weights of `sorsa.targets`, or everything.

    Returns:
        the targets; none where everything is trained.
    """
    model.requires_grad_(sorsa is None)
    targets = [] if sorsa is None else select_targets(model, sorsa)
    for target in targets:
        linear = model.get_submodule(target.name)
        linear.weight = nn.Parameter(linear.weight.detach())  # apart from an embedding that it is tied with
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(precision.factor_dtype)
    return targets


@dataclass(frozen=True, slots=True)
class WeightsRecipe:
    """Every parameter as it is, or as training has left it.

    trainable: those that are trained, with their shapes.
    """

    trainable: dict[str, torch.Size]
    precision: Precision
    trained: Values | None = None

    @classmethod
    def of(cls, model: nn.Module, precision: Precision, trained: Values | None) -> "WeightsRecipe":
        """Of an operated model."""
        return cls({n: p.shape for n, p in model.named_parameters() if p.requires_grad}, precision, trained)

    def specs(self, item: Item) -> list[TensorSpec]:
        frozen = self.precision.residual_dtype
        if item.target is None:
            trained = item.name in self.trainable
            return [TensorSpec(item.name, item.shape, torch.float32 if trained else frozen, trainable=trained)]
        weight, bias = f"{item.name}.weight", f"{item.name}.bias"
        specs = [TensorSpec(weight, self.trainable[weight], torch.float32, trainable=True)]
        return [*specs, TensorSpec(bias, item.shape[:1], frozen)] if item.target.bias else specs

    def produce(self, item: Item, source: WeightSource) -> Produced:
        weight, bias = source.read(item)
        check_finite(item.name, weight)
        if item.target is not None and item.target.transposed:
            weight = weight.t()
        name = item.name if item.target is None else f"{item.name}.weight"
        if self.trained is not None and name in self.trainable:
            weight = self.trained(name, self.trainable[name])
        return [weight] if bias is None else [weight, bias], []
