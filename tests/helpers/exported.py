"""Finished runs as plain transformers and plain torch see them."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sorsa_ds.model import adapter_file
from tests.helpers.finished import base_of

INPUT = torch.arange(1, 25).view(2, 12) % 64


def logits(model) -> torch.Tensor:
    """The logits of a model on a fixed input."""
    with torch.no_grad():
        return model.eval()(INPUT).logits.float()


def plainly(folder: Path, **settings):
    """transformers' own loader. RWKV: without its fp16 rescaling, which moves LayerNorm's epsilon."""
    rwkv = json.loads((folder / "config.json").read_text())["model_type"] == "rwkv"
    return AutoModelForCausalLM.from_pretrained(folder, **{**({"rescale_every": 0} if rwkv else {}), **settings})


def layers_by_hand(run: Path, precision="fp32") -> dict[str, torch.Tensor]:
    """The merged weight of every adapted linear in float64, as the checkpoint stores it."""
    described = adapter_file.read_description(run / "adapter")
    initial, trained = (load_file(run / "adapter" / name) for name in (adapter_file.INITIAL, adapter_file.TRAINED))
    model = plainly(base_of(run), dtype=torch.float32)

    def product(factors, name):
        U, s, V = (factors[f"{name}.{leaf}"] for leaf in ("U", "s", "V"))
        alpha, rank = described.adapter.alpha, s.numel()
        if precision == "bf16":
            U, s = U.bfloat16(), s.bfloat16()
        left = U * (s * (alpha / rank) if alpha else s)
        if precision != "fp32":
            left, V = left.bfloat16(), V.bfloat16()
        return left.double() @ V.double().T

    merged = {}
    for name in described.layers:
        module = model.get_submodule(name)
        transposed = type(module).__name__ == "Conv1D"
        W = module.weight.detach().double()
        rest = (W.T if transposed else W) - product(initial, name)
        rest = rest.float() if precision == "fp32" else rest.bfloat16()
        whole = rest.double() + product(trained, name)
        merged[name] = whole.T if transposed else whole
    return merged


def change_description(run: Path, **values) -> None:
    """Overwrite fields of a run's sorsa_config.json."""
    adapter_file.write_description(run / "adapter", replace(adapter_file.read_description(run / "adapter"), **values))
