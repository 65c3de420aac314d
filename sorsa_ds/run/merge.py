"""The weights that a trained model stands for: of a run on disk, parameter by parameter, or of a model in memory.

Every reader of merged weights (export, evaluation, analysis) comes here. What a weight is merged from is the method's
own (`methods.method.Method.merged_weight` and `plain_layer`).
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sorsa_ds.methods.registry import METHODS
from sorsa_ds.model.experts import put_back, stacked_as
from sorsa_ds.model.new_tokens import with_new_rows
from sorsa_ds.model.whole_recipe import whole_value
from sorsa_ds.run.source import Source
from sorsa_ds.runtime.precision import Precision


def merged(source: Source, name: str, untrained: bool = False) -> Tensor:
    """A changed parameter of the base model in fp32, laid out as it is there: what training computed with.

    Args:
        untrained: whether it is given as SORSA's training began, with what its residual had lost by being packed.

    Raises:
        ValueError: a file is damaged, or the base model is not the one that was trained on.
    """
    if any(one.name == name for one in source.whole):
        return outside_linears(source, name, untrained)
    target = source.changed[name]
    weight = source.method.merged_weight(source, name, target, untrained)
    if target is not None and target.experts:
        return stacked_as(weight, source.model.get_parameter(name).shape, target.transposed)
    return weight.t() if target is not None and target.transposed else weight


def outside_linears(source: Source, name: str, untrained: bool = False) -> Tensor:
    """A parameter outside of the adapted linears in fp32: trained whole, or the base model's with rows of new tokens.

    Args:
        untrained: whether it is given as training began.

    Raises:
        ValueError: a file is damaged, or the base model is not the one that was trained on.
    """
    if not untrained and any(one.name == name for one in source.whole):
        return whole_value(source.trained, name, source.precision)
    return with_new_rows(source.weights.parameter(name).float(), source.model.get_parameter(name).shape)


@torch.no_grad()
def merge_dense(model: PreTrainedModel, method: str, trained_in: Precision, dtype: torch.dtype) -> PreTrainedModel:
    """Put plain weights in the place of a method's layers, all in `dtype`; changes the model and returns it.

    A weight is merged in fp32 from what training computed with, and rounded once, as `launch/export.py --format merged`
    does. Over a packed residual the factors stay apart. Buffers keep their dtype: rotary frequencies must not be
    rounded.

    Args:
        method: the name of the method that trained the model.
        trained_in: the precision in which it was trained.
    """
    made: dict[nn.Module, nn.Module | Tensor | None] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module not in made:
            made[module] = METHODS[method].plain_layer(module, trained_in, dtype)
        plain = made[module]
        if isinstance(plain, Tensor):
            put_back(model, name, plain)
        elif plain is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model
