"""The optimizers that an engine trains with."""

import torch


def adamw(rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float):
    """A function that makes AdamW from the trainable parameters, as `SorsaEngine` expects its optimizer."""

    def make(parameters) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            list(parameters), lr=rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True
        )

    return make
