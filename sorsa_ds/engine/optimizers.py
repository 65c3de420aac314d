"""The optimizers that an engine trains with."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sorsa_ds.config.train_settings import TrainConfig

MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]
"""Makes the optimizer from the trainable parameters, as `SorsaEngine` expects it, or from groups of them."""


def optimizer(train: TrainConfig, faster: Sequence[Tensor] = (), ratio: float = 1.0) -> MakeOptimizer:
    """A function that makes the optimizer of a run from the trainable parameters.

    Args:
        faster: the trainable parameters that learn with `ratio` times the learning rate, in a group of their own behind
            the others'. The schedule scales the rates of both.
    """
    kind = {"adamw": adamw, "adamw_8bit": adamw_8bit}[train.optimizer]
    make = kind(train.peak_rate, train.adam_betas, train.adam_epsilon, train.weight_decay)
    if not faster:
        return make

    def make_in_groups(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        apart = {id(parameter) for parameter in faster}
        others = [parameter for parameter in parameters if id(parameter) not in apart]
        return make([{"params": others}, {"params": [*faster], "lr": ratio * train.peak_rate}])

    return make_in_groups


def adamw(rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float) -> MakeOptimizer:
    """A function that makes PyTorch's AdamW, with fused kernels."""

    def make(parameters: Iterable[Any]) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            list(parameters), lr=rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True
        )

    return make


def adamw_8bit(rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float) -> MakeOptimizer:
    """A function that makes bitsandbytes' AdamW, whose moments are 8-bit codes with one scale for each 256 numbers.

    Masters of fewer than 4,096 numbers have moments in fp32.
    """

    def make(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit  # its import starts CUDA

        return AdamW8bit(list(parameters), lr=rate, betas=betas, eps=epsilon, weight_decay=weight_decay)

    return make


def moment_bytes_8bit(numel: int) -> int:
    """Bytes of both moments of one master of so many numbers, as `adamw_8bit` holds them."""
    return 8 * numel if numel < 4096 else 2 * numel + 8 * -(-numel // 256)
