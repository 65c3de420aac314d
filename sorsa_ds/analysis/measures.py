"""The figures of one matrix, and of a matrix W_t against the one that training began with, W_0. Pure functions.

Shapes, used as suffixes of tensor names: M out_features, N in_features, K = min(M, N), R rank. Everything is computed
in the dtype that is given (float64 as `compute` calls it); the results are Python floats without a unit.
"""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

_EPS = torch.finfo(torch.float32).eps
"""Merged weights and factors come in float32: a singular value under eps ||W||_F may be rounding, and is taken as 0."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The full singular value decomposition W = U diag(s) V^T of a matrix: U (M, K), s (K,) descending, V (N, K)."""

    U: Tensor
    s: Tensor
    V: Tensor

    @classmethod
    def of(cls, W_MN: Tensor) -> "Spectrum":
        """Of a matrix, on the CPU by LAPACK, in its dtype."""
        U, s, Vt = torch.linalg.svd(W_MN, full_matrices=False)
        return cls(U, s, Vt.t())


def delta_sigma(now: Spectrum, start: Spectrum) -> float:
    """sum_i |sigma_i(W_t) - sigma_i(W_0)| / k (SORSA, eq. 1), in the weights' own unit."""
    return (now.s - start.s).abs().mean().item()


@dataclass(frozen=True, slots=True)
class Turn:
    """How far singular vectors have turned, each between 0 (not at all) and 1.

    literal: each against the one of the same order (SORSA, eq. 2 to 4). matched: each against its partner under the
    best one-to-one matching, so that mere swapping counts nothing. subspace: the leading r left and right vectors taken
    together, as the subspaces that they span.
    """

    literal: float
    matched: float
    subspace: float

    @property
    def swapping(self) -> float:
        """The share of `literal` that is swapped order and no turn, between 0 and 1."""
        return (self.literal - self.matched) / self.literal if self.literal > 0 else 0.0


def turn(now: Spectrum, start: Spectrum, rank: int) -> Turn:
    """Delta-D = 1 - (1 / 2k) sum_i (|<u_i, u_i0>| + |<v_i, v_i0>|), and two readings that bear swapping.

    The matching maximises the same sum over all permutations of the indices of W_0. The subspaces' figure is
    1 - (1 / 2r) (||U_r^T U_r0||_* + ||V_r^T V_r0||_*), the mean over cosines of principal angles: any change of basis
    inside them counts nothing.

    Args:
        rank: r of the subspaces; at most k is taken.
    """
    left_KK, right_KK = (now.U.t() @ start.U), (now.V.t() @ start.V)
    likeness_KK = left_KK.abs() + right_KK.abs()
    k = len(now.s)
    rows, columns = linear_sum_assignment(likeness_KK.numpy(), maximize=True)
    literal = likeness_KK.diagonal().sum().item()
    matched = max(literal, likeness_KK[torch.from_numpy(rows), torch.from_numpy(columns)].sum().item())
    r = min(rank, k)
    angles = sum(torch.linalg.svdvals(side[:r, :r]).sum().item() for side in (left_KK, right_KK))
    return Turn(*(
        max(0.0, 1 - total / (2 * count))  # rounding can make a cosine 1 + 1e-16
        for total, count in ((literal, k), (matched, k), (angles, r))
    ))  # fmt: skip


def condition(s: Tensor) -> float:
    """kappa = sigma_max / sigma_min over the nonzero singular values (SORSA, Theorem 5.6); infinite for zero."""
    kept = s[s > _EPS * torch.linalg.vector_norm(s)]
    return (kept.max() / kept.min()).item() if len(kept) else float("inf")


def orthonormality(factor: Tensor) -> float:
    """||U^T U - I||_F of a factor with R columns: what the regulariser holds down (SORSA, eq. 9)."""
    gram_RR = factor.t() @ factor
    return torch.linalg.matrix_norm(gram_RR - torch.eye(len(gram_RR), dtype=gram_RR.dtype)).item()


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of s / sum(s) (Roy and Vetterli, 2007), between 1 and K; 0 of the zero matrix."""
    total = s.sum()
    if total == 0:
        return 0.0
    return torch.special.entr(s / total).sum().exp().item()


def stable_rank(s: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2, between 1 and K; 0 of the zero matrix."""
    return (s.square().sum() / s.max().square()).item() if s.max() > 0 else 0.0
