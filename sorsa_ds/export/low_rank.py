"""The change of a weight as a product of two thin matrices: a LoRA on the base weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sorsa_ds.methods.peft_layers import MUTATING
from sorsa_ds.model.targets import Target, scale_of
from sorsa_ds.run.source import Source
from sorsa_ds.sorsa.decompose import as_used


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of a weight as B A: B (M, K), A (K, N), contiguous fp32.

    error: ||dW - B A||_F / ||dW||_F of what was cut off, 0 where nothing was.
    """

    B: Tensor
    A: Tensor
    error: float


def change(source: Source, target: Target, rank: int) -> LowRank:
    """dW, the best approximation of a rank; exact from `exact_rank` on.

    With SORSA dW = scale * (U diag(s) V^T - U_0 diag(s_0) V_0^T). [U s, -U_0 s_0] [V, V_0]^T would be exact too, but
    its parts nearly cancel: a server that rounds them to bf16 would lose much of the change. The singular value
    decomposition of the same product has nothing to cancel.
    """
    left, right = (_sorsa_product if source.described.method == "sorsa" else _peft_product)(source, target)
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right)
    X, d, Yt = torch.linalg.svd(R_left @ R_right.t(), full_matrices=False)
    root = d[:rank].sqrt()
    B = (Q_left @ X[:, :rank]) * root
    A = root[:, None] * (Yt[:rank] @ Q_right.t())
    whole = d.norm().item()
    return LowRank(B.float().contiguous(), A.float().contiguous(), d[rank:].norm().item() / whole if whole else 0.0)


def exact_rank(source: Source, target: Target) -> int:
    """The rank from which on `change` cuts nothing off."""
    twice = source.described.method in ("sorsa", *MUTATING)
    return min((2 if twice else 1) * target.rank, target.out_features, target.in_features)


def _sorsa_product(source: Source, target: Target) -> tuple[Tensor, Tensor]:
    """(left (M, 2 R), right (N, 2 R)), in float64: dW = left right^T."""
    scale, formats = scale_of(target, source.described.sorsa), source.precision
    initial, trained = (
        as_used(factors, formats.compute_dtype, formats.factor_dtype)
        for factors in source.factors(target, torch.empty(0))
    )
    left = torch.cat([trained.U * (scale * trained.s), -initial.U * (scale * initial.s)], 1).double()
    return left, torch.cat([trained.V, initial.V], 1).double()


def _peft_product(source: Source, target: Target) -> tuple[Tensor, Tensor]:
    """The same of a LoRA, dW = scale * B A, and of a method that began with B_0 A_0 taken off the weight."""
    files = [source.trained, source.initial] if source.described.method in MUTATING else [source.trained]
    A, B = ([file.tensor(f"{target.name}.lora_{leaf}.default.weight").double() for file in files] for leaf in "AB")
    signed = [B[0], *(-b for b in B[1:])]
    return scale_of(target, source.described.sorsa) * torch.cat(signed, 1), torch.cat(A).t()
