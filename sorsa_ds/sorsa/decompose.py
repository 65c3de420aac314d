"""The singular triplets with which a layer begins, and the residual W_r that they leave (SORSA, eq. 5 to 7).

Shapes: W (M, N), U (M, R), s (R,), V (N, R), residual (M, N).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sorsa_ds.sorsa import truncated_svd
from sorsa_ds.sorsa.sides import Sides

SvdMethod = Literal["randomized", "exact"]

SAFE_SCALE = 1e6
"""Weights whose largest entry is not in 1 / SAFE_SCALE .. SAFE_SCALE are rescaled: fp32 must hold their squares."""


@dataclass(slots=True)
class Factors:
    """Singular triplets of a matrix: contiguous, s descending, in float32, or in float64 if the matrix is.

    Those of several matrices of one shape have the number E of matrices before their shapes.
    """

    U: Tensor
    s: Tensor
    V: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, s and V."""
        return self.U, self.s, self.V


@dataclass(slots=True)
class Accuracy:
    """How a decomposition was made, and how accurate it is.

    way: `exact`, or `krylov` where that was allowed and expected to be faster.
    captured: the triplets' share of the matrix's energy ||W||_F^2.
    excess: (residual energy - optimum) / optimum. It is 0 for `exact`, whichever triplets were asked for, and else an
        estimate that needs no full SVD and as a rule lies above the truth
        (`sorsa_ds.sorsa.truncated_svd.excess_estimate`). An optimum below 1e-6 ||W||_F^2 counts as 1e-6 ||W||_F^2.
    iterations: blocks of the Krylov basis; 0 for `exact`.
    capped: whether the search ended at the cap on iterations, before it reached the tolerance.
    """

    way: Literal["exact", "krylov"]
    captured: float
    excess: float
    iterations: int
    capped: bool


@dataclass(slots=True)
class Decomposition(Factors):
    """Singular triplets, and how accurate they are."""

    accuracy: Accuracy


def decompose(
    weight: Tensor,
    rank: int,
    name: str = "weight",
    method: SvdMethod = "exact",
    tolerance: float = 1e-3,
    max_iterations: int = 16,
    first: int = 0,
) -> Decomposition:
    """Singular triplets of a weight (M, N), the leading ones or others, in float32 or better whatever its dtype.

    U and V are orthonormal to rounding, also where singular values vanish. The largest entry of each column of U is
    positive, and random numbers depend on the name only: every rank, world size and device gets the same factors, up
    to rounding.

    Args:
        name: the layer's name, which seeds the random numbers and stands in error messages.
        method: `exact`, or `randomized`: by iteration, where that is expected to be faster for the shape and rank.
        tolerance: relative excess of the residual energy over the optimum at which the iteration ends.
        max_iterations: cap on the iterations. The result says whether it ended the search.
        first: how many triplets with larger singular values are passed over. If any, the decomposition is exact.

    Raises:
        ValueError: the rank, or the first triplet with it, exceeds min(M, N), the weight holds NaN or Inf, its singular
            values overflow, or the tolerance or the cap is not positive. The message names the layer.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"{name}: rank {rank} exceeds min(out, in) = {min(weight.shape)}")
    if not 0 <= first <= min(weight.shape) - rank:
        raise ValueError(f"{name}: triplets {first} to {first + rank - 1} are not all below {min(weight.shape)}")
    if tolerance <= 0 or max_iterations < 1:
        raise ValueError(f"SVD tolerance {tolerance} and max_iterations {max_iterations} must be positive")
    work, scale = _rescaled(weight, name)
    wide = work.shape[0] < work.shape[1]
    W_MN = work.t() if wide else work
    M, N = W_MN.shape
    energy = truncated_svd.energy(W_MN)
    found = None
    if method == "randomized" and first == 0 and energy > 0 and not truncated_svd.prefers_exact(M, N, rank, tolerance):
        found = truncated_svd.krylov(W_MN, energy, rank, name, tolerance, max_iterations)
    if found is None:
        V_RN, image_RM = truncated_svd.exact(W_MN, rank, first)
    else:
        V_RN, image_RM = found.V_RN, found.image_RM
    U, s, V = _triplets(V_RN, image_RM)
    if wide:
        U, V = V, U
    factors, captured = _as_factors(U, s, V, scale, energy, work.dtype, name)
    if found is None:
        accuracy = Accuracy("exact", captured, excess=0.0, iterations=0, capped=False)
    else:
        accuracy = Accuracy("krylov", captured, found.excess, found.iterations, capped=not found.met)
    return Decomposition(*factors.tensors(), accuracy)


def decompose_within(weight: Tensor, directions_RN: Tensor, name: str = "weight") -> Decomposition:
    """The singular triplets of what a weight (M, N) makes of R input directions: of W D^T D, exactly, as `decompose`.

    V spans the directions, and the residual W_r has no part of the weight in them: W_r D^T = 0.

    Args:
        directions_RN: orthonormal rows.
        name: the layer's name, which stands in error messages.

    Raises:
        ValueError: there are more directions than min(M, N), the weight holds NaN or Inf, or its singular values
            overflow. The message names the layer.
    """
    if len(directions_RN) > min(weight.shape):
        raise ValueError(f"{name}: {len(directions_RN)} directions exceed min(out, in) = {min(weight.shape)}")
    work, scale = _rescaled(weight, name)
    directions_RN = directions_RN.to(torch.float64)
    image_RM = torch.cat([directions_RN @ rows.double().t() for rows in work.split(truncated_svd.GRAM_ROWS)], dim=1)
    turn_RR = torch.linalg.svd(image_RM, full_matrices=False)[0].t()
    U, s, V = _triplets(turn_RR @ directions_RN, turn_RR @ image_RM)
    factors, captured = _as_factors(U, s, V, scale, truncated_svd.energy(work), work.dtype, name)
    return Decomposition(*factors.tensors(), Accuracy("exact", captured, excess=0.0, iterations=0, capped=False))


def within_bytes(out_features: int, in_features: int, rank: int) -> int:
    """Bytes that `decompose_within` takes besides the weight and its result: rows of the weight and factors in fp64."""
    return 8 * (min(out_features, truncated_svd.GRAM_ROWS) * in_features + 4 * rank * (out_features + in_features))


def _as_factors(
    U: Tensor, s: Tensor, V: Tensor, scale: float, energy: float, dtype: torch.dtype, name: str
) -> tuple[Factors, float]:
    """Triplets of a rescaled weight as those of the weight, with signs fixed; and their share of its energy.

    Raises:
        ValueError: the largest singular value overflows.
    """
    signs = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))
    captured = s.double().square().sum().item() / energy if energy else 1.0
    s = (s * scale).to(dtype)
    if not s[0].item() < float("inf"):
        raise ValueError(f"{name}: its largest singular value exceeds what {dtype} holds")
    U, V = ((side * signs).to(dtype).contiguous() for side in (U, V))
    return Factors(U, s, V), captured


def stacked(found: Sequence[Decomposition]) -> Decomposition:
    """The decompositions of several matrices of one shape as one: U (E, M, R), s (E, R), V (E, N, R).

    Of their accuracies the worst stands for all, and the mean of the captured shares.
    """
    accuracies = [one.accuracy for one in found]
    worst = max(accuracies, key=lambda accuracy: (accuracy.capped, accuracy.excess, accuracy.iterations))
    captured = sum(accuracy.captured for accuracy in accuracies) / len(accuracies)
    U, s, V = (torch.stack([getattr(one, name) for one in found]) for name in ("U", "s", "V"))
    return Decomposition(U, s, V, replace(worst, captured=captured))


def _rescaled(weight: Tensor, name: str) -> tuple[Tensor, float]:
    """The weight in float32 or better, divided by a scale that keeps its squares finite; and that scale, as a rule 1.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    low, high = work.aminmax()  # NaN propagates through aminmax, which is thirty times faster than isfinite
    peak = torch.maximum(-low, high).item()
    if not peak < float("inf"):
        raise ValueError(f"{name}: the pre-trained weight holds NaN or Inf; it cannot be decomposed")
    scale = peak if peak > 0 and not 1 / SAFE_SCALE < peak < SAFE_SCALE else 1.0
    return (work / scale if scale != 1.0 else work), scale


def _triplets(V_RN: Tensor, image_RM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (M, R), s (R,) and V (N, R) with s descending, from right singular vectors and their image V W^T."""
    # Up to rounding W V = U diag(s). QR makes U orthonormal also where columns of W V are zero or nearly so.
    U, R = torch.linalg.qr(image_RM.t())
    s, order = R.diagonal().abs().sort(descending=True)
    return (U * torch.where(R.diagonal() < 0, -1.0, 1.0))[:, order], s, V_RN.t()[:, order]


def residual(
    weight: Tensor,
    factors: Factors,
    *,
    used_dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Tensor:
    """W_r = W - scale * U diag(s) V^T, (M, N) in the factors' dtype, with the two sides rounded as they will be used.

    Because the product of the *rounded* sides is subtracted, the layer equals W at step 0 up to the rounding of W_r,
    which is small because W_r is small.

    Args:
        used_dtype: the dtype of the matrix products.
        factor_dtype: the dtype in which the layer holds U, s and V.
    """
    used = as_used(factors, used_dtype=used_dtype, factor_dtype=factor_dtype, scale=scale)
    rest = weight.to(used.left.dtype, copy=True)  # the one full-size matrix besides the weight
    return rest.addmm_(used.left, used.right.mT, alpha=-1.0)


def as_used(factors: Factors, *, used_dtype: torch.dtype, factor_dtype: torch.dtype, scale: float) -> Sides:
    """The two sides of the principal part as a forward pass computes with them, in the dtype of the given factors.

    Args:
        used_dtype: the dtype of the matrix products.
        factor_dtype: the dtype in which the layer holds U, s and V.
    """
    dtype = factors.U.dtype
    U, s, V = (factor.to(factor_dtype) for factor in (factors.U, factors.s, factors.V))
    sides = Sides.of(U, s, V, scale, used_dtype)
    return Sides(sides.left.to(dtype), sides.right.to(dtype))
