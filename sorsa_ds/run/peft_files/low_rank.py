"""The change of a weight as a product of two thin matrices: a LoRA on the base weight.

Where the weight is that of experts, all tensors have their number E before their shapes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sorsa_ds.model.targets import Target
from sorsa_ds.run.source import Source


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of a weight as B A: B (M, K), A (K, N), contiguous fp32.

    error: ||dW - B A||_F / ||dW||_F of what was cut off, 0 where nothing was.
    """

    B: Tensor
    A: Tensor
    error: float


def low_rank_change(source: Source, target: Target, rank: int, device: torch.device) -> LowRank:
    """The best approximation of dW of this rank, which is dW itself from `methods.method.Method.exact_rank` on.

    The method gives dW = left right^T. That would be a LoRA already; but with SORSA, and wherever a first product was
    taken off the weight, its parts nearly cancel, and a server that rounds them to bf16 would lose much of the change.
    The singular value decomposition of the same product has nothing to cancel.

    Args:
        device: where it is decomposed. What is returned lies on the CPU.
    """
    left, right = (side.to(device) for side in source.method.change_product(source, target))
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right)
    X, d, Yt = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    root = d[..., :rank].sqrt()
    B = (Q_left @ X[..., :rank]) * root.unsqueeze(-2)
    A = root.unsqueeze(-1) * (Yt[..., :rank, :] @ Q_right.mT)
    whole = d.norm().item()
    error = d[..., rank:].norm().item() / whole if whole else 0.0
    return LowRank(B.float().contiguous().cpu(), A.float().contiguous().cpu(), error)
