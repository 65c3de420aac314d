"""Filling a model with parameters that are trained whole: all of them, or some beside the adapters of other layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sorsa_ds.model.adapter_file import FactorFile
from sorsa_ds.model.fill import Produced, Recipe, check_finite
from sorsa_ds.model.new_tokens import with_new_rows
from sorsa_ds.model.schedule import Item
from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.model.weight_sources import WeightSource
from sorsa_ds.model.whole_modules import WholeParameter
from sorsa_ds.runtime.precision import Precision


@dataclass(frozen=True, slots=True)
class WeightsRecipe:
    """Fills a model with its own parameters, as they were pre-trained or as training has left them.

    trainable: the parameters that are trained, with their shapes.
    trained: gives them as training has left them, by name and shape, fp32 on the CPU; None where it has not begun.
    """

    trainable: dict[str, torch.Size]
    precision: Precision
    trained: Callable[[str, torch.Size], Tensor] | None = None

    @classmethod
    def of(
        cls, model: nn.Module, precision: Precision, trained: Callable[[str, torch.Size], Tensor] | None
    ) -> "WeightsRecipe":
        """The recipe of a model on which it is marked what is trained."""
        return cls({n: p.shape for n, p in model.named_parameters() if p.requires_grad}, precision, trained)

    def specs(self, item: Item) -> list[TensorSpec]:
        frozen = self.precision.residual_dtype
        if item.target is None:
            trained = item.name in self.trainable
            return [TensorSpec(item.name, item.shape, torch.float32 if trained else frozen, trainable=trained)]
        weight, bias = item.target.weight, f"{item.name}.bias"
        specs = [TensorSpec(weight, self.trainable[weight], torch.float32, trainable=True)]
        return [*specs, TensorSpec(bias, item.shape[:1], frozen)] if item.target.bias else specs

    def produce(self, item: Item, source: WeightSource) -> Produced:
        weight, bias = source.read(item)
        check_finite(item.name, weight)
        if item.target is not None and item.target.transposed:
            weight = weight.t()
        name = item.name if item.target is None else item.target.weight
        if self.trained is not None and name in self.trainable:
            weight = self.trained(name, self.trainable[name])
        elif item.target is None:
            weight = with_new_rows(weight, item.shape)
        return [weight] if bias is None else [weight, bias], []


@dataclass(frozen=True, slots=True)
class BesideAdapters:
    """The recipe of a method's adapters, with another one for the parameters that are trained whole beside them."""

    adapters: Recipe
    whole: WeightsRecipe

    def specs(self, item: Item) -> list[TensorSpec]:
        return self._recipe(item).specs(item)

    def produce(self, item: Item, source: WeightSource) -> Produced:
        return self._recipe(item).produce(item, source)

    def _recipe(self, item: Item) -> Recipe:
        return self.whole if item.target is None and item.name in self.whole.trainable else self.adapters


def train_beside(
    model: nn.Module,
    adapters: Recipe,
    whole: Sequence[WholeParameter],
    precision: Precision,
    trained: Callable[[str, torch.Size], Tensor] | None,
) -> Recipe:
    """Mark parameters of an adapted model without memory as trained whole; returns the recipe that fills all tensors.

    Args:
        adapters: the recipe of all other tensors.
        trained: gives a parameter as training has left it, by name and shape, fp32 on the CPU; None where training has
            not begun.
    """
    shapes = {}
    for one in whole:
        parameter = model.get_parameter(one.name)
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to(precision.factor_dtype)
        shapes[one.name] = parameter.shape
        for module in map(model.get_submodule, one.modules):
            if isinstance(module, nn.Embedding) and precision.factor_dtype != precision.residual_dtype:
                module.register_forward_hook(partial(_narrowed, dtype=precision.residual_dtype))
    return BesideAdapters(adapters, WeightsRecipe(shapes, precision, trained))


def _narrowed(module: nn.Module, inputs: object, output: Tensor, *, dtype: torch.dtype) -> Tensor:
    """An embedding's output in the dtype that it has where the table is frozen.

    Under autocast an fp32 table would make the whole residual stream fp32, which takes twice the memory, and which a
    LayerNorm with frozen parameters in bf16 refuses on a CPU.
    """
    return output.to(dtype)


def whole_value(file: FactorFile, name: str, precision: Precision) -> Tensor:
    """A parameter that was trained whole, in fp32, rounded as training computed with it."""
    return file.tensor(name).to(precision.factor_dtype).float()
