"""One layer out of its base weight and its factors: merged, or as a LoRA on the base weight.

Shapes, used as suffixes of tensor names: M out_features, N in_features, R rank, K rank of the LoRA.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sorsa_ds.decompose import as_used, residual
from sorsa_ds.export.source import Source
from sorsa_ds.surgery import Target, scale_of


def merged(source: Source, target: Target, untrained: bool = False) -> Tensor:
    """W_r + scale * U diag(s) V^T, (M, N) in fp32, with W_r and the factors rounded as they were in training.

    untrained: with the factors with which training began.
    """
    scale, formats = scale_of(target, source.described.sorsa), source.precision
    weight_MN = source.weights.weight(target)
    initial, trained = source.factors(target, weight_MN)
    rest = residual(weight_MN, initial, used_dtype=formats.compute_dtype, scale_dtype=formats.factor_dtype, scale=scale)
    kept = source.storage.pack(rest)
    del rest
    W_MN = source.storage.dense(kept, tuple(weight_MN.shape), formats.compute_dtype).to(initial.U.dtype)
    now = as_used(initial if untrained else trained, formats.compute_dtype, formats.factor_dtype)
    return W_MN.addmm_(now.U * (scale * now.s), now.V.t())


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of a weight as B A: B (M, K), A (K, N), contiguous fp32.

    error: ||dW - B A||_F / ||dW||_F of what was cut off, 0 where nothing was.
    """

    B: Tensor
    A: Tensor
    error: float


def change(source: Source, target: Target, rank: int) -> LowRank:
    """dW = scale * (U diag(s) V^T - U_0 diag(s_0) V_0^T), the best approximation of a rank; exact from rank 2 R on.

    [U s, -U_0 s_0] [V, V_0]^T would be exact too, but its parts nearly cancel: a server that rounds them to bf16
    would lose much of the change. The singular value decomposition of the same product has nothing to cancel.
    """
    scale, formats = scale_of(target, source.described.sorsa), source.precision
    initial, trained = (
        as_used(factors, formats.compute_dtype, formats.factor_dtype)
        for factors in source.factors(target, torch.empty(0))
    )
    left = torch.cat([trained.U * (scale * trained.s), -initial.U * (scale * initial.s)], 1).double()
    right = torch.cat([trained.V, initial.V], 1).double()
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right)
    X, d, Yt = torch.linalg.svd(R_left @ R_right.t(), full_matrices=False)
    root = d[:rank].sqrt()
    B = (Q_left @ X[:, :rank]) * root
    A = root[:, None] * (Yt[:rank] @ Q_right.t())
    whole = d.norm().item()
    return LowRank(B.float().contiguous(), A.float().contiguous(), d[rank:].norm().item() / whole if whole else 0.0)


def exact_rank(target: Target) -> int:
    """The rank from which on `change` cuts nothing off."""
    return min(2 * target.rank, target.out_features, target.in_features)
