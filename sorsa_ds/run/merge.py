"""One parameter out of its base weight and what was trained: merged, or as a LoRA on the base weight.

Shapes, used as suffixes of tensor names: M out_features, N in_features, R rank, K rank of the LoRA.
"""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from sorsa_ds.methods import peft_layers
from sorsa_ds.model.targets import Target, scale_of
from sorsa_ds.run.source import Source
from sorsa_ds.runtime.precision import Precision, full_fp32_products
from sorsa_ds.sorsa.decompose import Factors, as_used, residual
from sorsa_ds.sorsa.layer import SorsaLinear


def merged(source: Source, name: str, untrained: bool = False) -> Tensor:
    """A changed parameter of the base model, laid out as it is there, in fp32: what training computed with.

    untrained: as SORSA's training began.
    """
    target, method = source.changed[name], source.described.method
    if target is None or method == "partial":
        return source.trained.tensor(name).to(source.precision.factor_dtype).float()
    W_MN = _sorsa(source, target, untrained) if method == "sorsa" else _peft(source, target)
    return W_MN.t() if target.transposed else W_MN


def _sorsa(source: Source, target: Target, untrained: bool) -> Tensor:
    """W_r + scale * U diag(s) V^T, (M, N), with W_r and the factors rounded as they were in training."""
    scale, formats = scale_of(target, source.described.sorsa), source.precision
    weight_MN = source.weights.weight(target)
    initial, trained = source.factors(target, weight_MN)
    rest = residual(weight_MN, initial, used_dtype=formats.compute_dtype, scale_dtype=formats.factor_dtype, scale=scale)
    kept = source.storage.pack(rest)
    del rest
    W_MN = source.storage.dense(kept, tuple(weight_MN.shape), formats.compute_dtype).to(initial.U.dtype)
    now = as_used(initial if untrained else trained, formats.compute_dtype, formats.factor_dtype)
    return W_MN.addmm_(now.U * (scale * now.s), now.V.t())


def _peft(source: Source, target: Target) -> Tensor:
    """(M, N), merged by PEFT, over the frozen weight as it was rounded in training."""
    initial = source.initial and source.initial.values
    layer = source.peft.layer(target, source.weights.weight(target).float(), None, initial)
    frozen = layer.base_layer.weight
    frozen.data = frozen.data.to(source.precision.residual_dtype).float()
    peft_layers.set_trained(
        layer, target, lambda name, shape: source.trained.values(name, shape).to(source.precision.factor_dtype).float()
    )
    return peft_layers.merged(layer, target)


def merge_dense(model: PreTrainedModel, trained: Precision, dtype: torch.dtype) -> PreTrainedModel:
    """Put plain linears in the place of SORSA's and PEFT's, all in `dtype`; over a packed residual factors stay apart.

    W = W_r + scale * U diag(s) V^T is taken in fp32 of what training computed with in its precision `trained`, and
    rounded once, as `launch/export.py --format merged` does; so is what PEFT merges. Buffers keep their dtype: rotary
    frequencies must not be rounded. Changes the model and returns it.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, SorsaLinear) and not module.storage.quantised:
            whole = _merged(module, trained, dtype)
        elif isinstance(module, BaseTunerLayer):
            with full_fp32_products():
                whole = peft_layers.plain(module)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, whole)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def _merged(layer: SorsaLinear, trained: Precision, dtype: torch.dtype) -> torch.nn.Linear:
    kept = [getattr(layer, name) for name in layer.storage.names]
    W_MN = layer.storage.dense(kept, (layer.out_features, layer.in_features), trained.compute_dtype)
    now = as_used(
        Factors(layer.U.float(), layer.s.float(), layer.V.float()), trained.compute_dtype, trained.factor_dtype
    )
    with full_fp32_products():
        W_MN = torch.addmm(W_MN.float(), now.U * (layer.scale * now.s), now.V.t())
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(W_MN.to(dtype), requires_grad=False)
    if layer.bias is not None:
        plain.bias = torch.nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return plain
