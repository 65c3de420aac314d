"""Models with SORSA as PEFT's method: made, moved away from their beginning, and computed."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from sorsa_ds.peft import SorsaConfig, SorsaLayer

INPUT = torch.arange(1, 25).view(2, 12) % 64


def load(folder, **options):
    """The base model."""
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def logits(model):
    """What it computes on the input."""
    with torch.no_grad():
        return model(INPUT).logits


def adapted(folder, move=0.2, base=None, **config):
    """A PEFT model whose trained factors have moved by about `move` of themselves."""
    model = get_peft_model(base or load(folder), SorsaConfig(**{"r": 4, "target_modules": "all-linear", **config}))
    return moved(model, move)


def moved(model, move, name="default", seed=0):
    """Move the factors of an adapter; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model).values():
            for parameter in layer.sorsa_factors[name].parameters() if name in layer.sorsa_factors else ():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((move * parameter.float().std(correction=0) * noise).to(parameter))
    return model.eval()


def layers_of(model) -> dict[str, SorsaLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SorsaLayer)}
