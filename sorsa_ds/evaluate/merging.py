"""A trained model made plain for inference: what was trained is added to the frozen weights, nothing is slower then.

Shapes, used as suffixes of tensor names: M out_features, N in_features.
"""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from sorsa_ds.methods import peft_layers
from sorsa_ds.runtime.precision import Precision, full_fp32_products
from sorsa_ds.sorsa.decompose import Factors, as_used
from sorsa_ds.sorsa.layer import SorsaLinear


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
