"""The truncated SVD that a layer starts from, and the residual it leaves (SORSA, eq. 5 to 7).

Shapes: W (M, N), U (M, R), s (R,), V (N, R), residual (M, N).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Factors:
    """Leading singular triplets of a matrix, s descending, contiguous, in float32 (or float64 for such a matrix)."""

    U: Tensor
    s: Tensor
    V: Tensor


def decompose(weight: Tensor, rank: int, name: str = "weight") -> Factors:
    """Exact leading singular triplets of a weight (M, N), in float32 or better whatever its dtype.

    Signs follow one convention (the largest entry of each column of U is positive), so that every rank, world size
    and device gets the same factors.

    Raises:
        ValueError: naming the layer, where rank > min(M, N) or the weight holds NaN or Inf.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"{name}: rank {rank} exceeds min(out, in) = {min(weight.shape)}")
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not torch.isfinite(work).all():
        raise ValueError(f"{name}: the pre-trained weight holds NaN or Inf; it cannot be decomposed")
    U, s, Vh = torch.linalg.svd(work, full_matrices=False)
    U, s, V = U[:, :rank], s[:rank], Vh[:rank].t()
    signs = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))
    return Factors(U=(U * signs).contiguous(), s=s.contiguous(), V=(V * signs).contiguous())


def residual(
    weight: Tensor,
    factors: Factors,
    *,
    used_dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Tensor:
    """W_r = W - scale * U diag(s) V^T, (M, N) in the factors' dtype, against the factors as they will be used.

    The forward pass multiplies with U and V in the compute dtype (`used_dtype`) and with s in the dtype in which it is
    stored (`scale_dtype`). Subtracting the product of the factors *rounded like that* makes the layer equal W at step 0
    up to the rounding of W_r, which is small because W_r is.
    """
    dtype = factors.U.dtype
    U, V = factors.U.to(used_dtype).to(dtype), factors.V.to(used_dtype).to(dtype)
    s = factors.s.to(scale_dtype).to(dtype)
    return torch.addmm(weight.to(dtype), U * (scale * s), V.t(), alpha=-1.0)
