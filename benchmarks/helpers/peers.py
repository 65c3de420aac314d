"""The layers that SorsaLinear is compared with: PEFT's LoRA, the SORSA authors' own, and a frozen linear."""

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.residual_storage import Dense

REFERENCE = ("sorsa", "1.0.1")


def reference_layers():
    """The module `sorsa.layer` of the authors' package: its `Linear` and `calc_ortho`.

    It is loaded from its file, because the package's `__init__` imports a trainer that fails with today's transformers.

    Raises:
        ValueError: the package is not installed, or in another version than REFERENCE names.
    """
    name, wanted = REFERENCE
    try:
        found = distribution(name)
    except PackageNotFoundError:
        found = None
    if found is None or found.version != wanted:
        raise ValueError(f"the reference code is not installed: pip install --no-deps {name}=={wanted}")
    spec = importlib.util.spec_from_file_location("sorsa_reference_layer", found.locate_file("sorsa/layer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_reference(ours: SorsaLinear) -> nn.Module:
    """The authors' layer with the weights of one of ours; they share the tensors that have the same layout."""
    theirs = reference_layers().Linear(1, 1, r=1, alpha=ours.scale, bias=ours.bias is not None)
    theirs.weight = nn.Parameter(ours.residual.detach(), requires_grad=False)
    theirs.sorsa_A = nn.Parameter(ours.V.detach().t().contiguous())
    theirs.sorsa_S = nn.Parameter(ours.s.detach().clone())
    theirs.sorsa_B = nn.Parameter(ours.U.detach().clone())
    if ours.bias is not None:
        theirs.bias = nn.Parameter(ours.bias.detach(), requires_grad=False)
    return theirs


def layers(m: int, n: int, rank: int, frozen: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """One linear (m, n) without a bias, frozen, with SORSA and with LoRA, with random weights.

    frozen: dtype of the frozen weight; what is trained is in fp32.
    """
    weight = torch.randn(m, n, device=device, dtype=frozen) * n**-0.5
    sorsa = SorsaLinear(n, m, rank, device=device, storage=Dense(frozen))
    sorsa.residual.data = weight
    for parameter in (sorsa.U, sorsa.s, sorsa.V):
        nn.init.normal_(parameter, std=rank**-0.5)
    floor = nn.Linear(n, m, bias=False, device="meta")
    floor.weight = nn.Parameter(weight, requires_grad=False)
    holder = nn.Module()
    holder.linear = nn.Linear(n, m, bias=False, device="meta")
    holder.linear.weight = nn.Parameter(weight, requires_grad=False)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"]), holder.to(device), "default"
    )
    for adapter in (holder.linear.lora_A, holder.linear.lora_B):
        adapter.float()  # as get_peft_model does
    return {"frozen": floor, "sorsa": sorsa, "lora": holder.linear}
