"""The truncated SVD that a layer starts from, and the residual it leaves (SORSA, eq. 5 to 7).

Shapes: W (M, N), U (M, R), s (R,), V (N, R), residual (M, N).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sorsa_ds.sorsa import truncated_svd

Method = Literal["randomized", "exact"]

SAFE_SCALE = 1e6
"""Weights whose largest entry lies outside 1 / SAFE_SCALE to SAFE_SCALE are rescaled: fp32 holds their squares then."""


@dataclass(slots=True)
class Factors:
    """Leading singular triplets of a matrix, s descending, contiguous, in float32 (or float64 for such a matrix)."""

    U: Tensor
    s: Tensor
    V: Tensor


@dataclass(slots=True)
class Accuracy:
    """How a decomposition was made, and what it reached.

    way: `exact`, or `krylov` where that was allowed and expected to be faster.
    captured: the triplets' share of the matrix's energy ||W||_F^2.
    excess: (residual energy - optimum) / optimum: 0 for `exact`, else estimated without the full SVD, from above as
        a rule (`sorsa_ds.sorsa.truncated_svd.excess_estimate`). An optimum below 1e-6 ||W||_F^2 counts as that.
    iterations: blocks of the Krylov basis; 0 for `exact`.
    capped: the cap on iterations ended the search before the tolerance was reached.
    """

    way: Literal["exact", "krylov"]
    captured: float
    excess: float
    iterations: int
    capped: bool


@dataclass(slots=True)
class Decomposition(Factors):
    """Leading singular triplets, and how good they are."""

    accuracy: Accuracy


def decompose(
    weight: Tensor,
    rank: int,
    name: str = "weight",
    method: Method = "exact",
    tolerance: float = 1e-3,
    max_iterations: int = 16,
) -> Decomposition:
    """Leading singular triplets of a weight (M, N), in float32 or better whatever its dtype.

    U and V are orthonormal to rounding, also where singular values vanish. Signs follow one convention (the largest
    entry of each column of U is positive), and random numbers depend on the name alone, so that every rank, world
    size and device gets the same factors up to rounding.

    Args:
        method: `exact`, or `randomized`: by iteration, where that is expected to be faster for the shape and rank.
        tolerance: relative excess of the residual energy over the optimum at which the iteration ends.
        max_iterations: cap on the iteration; whether it was hit stands in the result.

    Raises:
        ValueError: naming the layer, where rank > min(M, N), the weight holds NaN or Inf, or its singular values
            overflow; for a tolerance or a cap that is not positive.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"{name}: rank {rank} exceeds min(out, in) = {min(weight.shape)}")
    if tolerance <= 0 or max_iterations < 1:
        raise ValueError(f"SVD tolerance {tolerance} and max_iterations {max_iterations} must be positive")
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    low, high = work.aminmax()  # NaN comes through; thirty times faster than isfinite
    peak = torch.maximum(-low, high).item()
    if not peak < float("inf"):
        raise ValueError(f"{name}: the pre-trained weight holds NaN or Inf; it cannot be decomposed")
    scale = peak if peak > 0 and not 1 / SAFE_SCALE < peak < SAFE_SCALE else 1.0
    work = work / scale if scale != 1.0 else work

    wide = work.shape[0] < work.shape[1]
    W_MN = work.t() if wide else work
    energy = truncated_svd.energy(W_MN)
    found = None
    if method == "randomized" and peak > 0 and not truncated_svd.prefers_exact(*W_MN.shape, rank, tolerance):
        found = truncated_svd.krylov(W_MN, energy, rank, name, tolerance, max_iterations)
    if found is None:
        V_RN = truncated_svd.exact(W_MN, rank).to(work.dtype)
        image_RM = V_RN @ W_MN.t()
    else:
        V_RN, image_RM = found.V_RN, found.image_RM
    # W V = U diag(s), but for rounding. QR makes U orthonormal also where columns of W V are zero or nearly so.
    U, R = torch.linalg.qr(image_RM.t())
    s, order = R.diagonal().abs().sort(descending=True)
    U, V = (U * torch.where(R.diagonal() < 0, -1.0, 1.0))[:, order], V_RN.t()[:, order]
    if wide:
        U, V = V, U
    signs = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))

    if not (s[0] * scale).item() < float("inf"):
        raise ValueError(f"{name}: its largest singular value exceeds what {work.dtype} holds")
    captured = s.double().square().sum().item() / energy if energy else 1.0
    if found is None:
        accuracy = Accuracy("exact", captured, excess=0.0, iterations=0, capped=False)
    else:
        accuracy = Accuracy("krylov", captured, found.excess, found.iterations, capped=not found.met)
    return Decomposition((U * signs).contiguous(), s * scale, (V * signs).contiguous(), accuracy)


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
    used = as_used(factors, used_dtype, scale_dtype)
    rest = weight.to(used.U.dtype, copy=True)  # the one full-size matrix besides the weight
    return rest.addmm_(used.U * (scale * used.s), used.V.t(), alpha=-1.0)


def as_used(factors: Factors, used_dtype: torch.dtype, scale_dtype: torch.dtype) -> Factors:
    """The factors rounded as the forward pass uses them, in the dtype that they have."""
    dtype = factors.U.dtype
    U, V = (factor.to(used_dtype).to(dtype) for factor in (factors.U, factors.V))
    return Factors(U, factors.s.to(scale_dtype).to(dtype), V)
