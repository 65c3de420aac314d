"""Pure functions for the figures of one matrix, and of a matrix W_t against W_0, with which training began.

Shapes, used as suffixes of tensor names: M out_features, N in_features, K = min(M, N), R rank. Everything is computed
in the dtype of the arguments (float64 by default of launch/analyze.py); the results are Python floats without a unit.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist
from torch import Tensor

_EPS = torch.finfo(torch.float32).eps
"""Merged weights and factors come in float32: a singular value under eps ||W||_F may be rounding, and is taken as 0."""
NEARLY = 0.01
"""Singular values that differ by more than this fraction of the largest are never taken as nearly equal."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The full singular value decomposition W = U diag(s) V^T of a matrix: U (M, K), s (K,) descending, V (N, K)."""

    U: Tensor
    s: Tensor
    V: Tensor

    @classmethod
    def of(cls, W_MN: Tensor) -> "Spectrum":
        """The decomposition of a matrix, on the CPU by LAPACK, in the matrix's dtype."""
        U, s, Vt = torch.linalg.svd(W_MN, full_matrices=False)
        return cls(U, s, Vt.t())


def delta_sigma(now: Spectrum, start: Spectrum) -> float:
    """sum_i |sigma_i(W_t) - sigma_i(W_0)| / k (SORSA, eq. 1), in the weights' own unit."""
    return (now.s - start.s).abs().mean().item()


@dataclass(frozen=True, slots=True)
class Turn:
    """How far singular vectors have turned, by four measures from 0 (not at all) to 1: literal >= matched >= clustered.

    literal: each vector against the one of the same order (SORSA, eq. 2 to 4). matched: each against its partner under
    the best one-to-one matching, so that a change of order counts nothing. clustered: partners whose singular values
    are nearly equal are compared as the subspaces that they span, so that mixing inside of these counts nothing either.
    subspace: the leading r left and right vectors are compared as the subspaces that they span.
    """

    literal: float
    matched: float
    clustered: float
    subspace: float

    @property
    def swapping(self) -> float:
        """The fraction of `literal` that is swapped order or mixing of nearly equal vectors, between 0 and 1."""
        return swapping_share(self.literal, self.clustered)


def swapping_share(literal: float, clustered: float) -> float:
    """The fraction of Delta-D that is no turn: of one linear, or of several by the means of their two measures."""
    return (literal - clustered) / literal if literal > 0 else 0.0


def turn(now: Spectrum, start: Spectrum, rank: int) -> Turn:
    """Delta-D = 1 - (1 / 2k) sum_i (|<u_i, u_i0>| + |<v_i, v_i0>|), and three variants that tolerate swapping.

    The matching maximises the same sum over all permutations of the indices of W_0. For clusters C of partners (see
    `tolerance`) the sum is over ||U_C^T U_C0||_* + ||V_C^T V_C0||_*, the cosines of principal angles: any change of
    basis inside of a cluster counts nothing. The figure of the leading subspaces is that of one cluster of r, over 2r.

    Where W is not square, the vectors of the longer side that belong to (nearly) zero singular values are an arbitrary
    basis of what is orthogonal to all others: the turn of the others is counted, and theirs is not.

    Args:
        rank: r of the leading subspaces; at most k is used.
    """
    left_KK, right_KK = (now.U.t() @ start.U), (now.V.t() @ start.V)
    likeness_KK = left_KK.abs() + right_KK.abs()
    k = len(now.s)
    partners = torch.from_numpy(linear_sum_assignment(likeness_KK.numpy(), maximize=True)[1])
    literal = likeness_KK.diagonal().sum().item()
    matched = max(literal, likeness_KK[torch.arange(k), partners].sum().item())
    del likeness_KK
    r = min(rank, k)
    angles = sum(torch.linalg.svdvals(side[:r, :r]).sum().item() for side in (left_KK, right_KK))

    longer = (len(now.U) > k, len(now.V) > k)
    clusters, zero = _clusters(now.s, start.s[partners], tolerance(now, start), any(longer))
    clustered = 0.0
    for side_KK, is_longer in ((left_KK, longer[0]), (right_KK, longer[1])):
        side_KK = side_KK[:, partners]
        for label, C in clusters.items():
            free = is_longer and label == zero
            clustered += len(C) if free else torch.linalg.svdvals(side_KK[C][:, C]).sum().item()
    return Turn(*(
        max(0.0, 1 - total / (2 * count))  # rounding can make a cosine 1 + 1e-16
        for total, count in ((literal, k), (matched, k), (max(matched, clustered), k), (angles, r))
    ))  # fmt: skip


def tolerance(now: Spectrum, start: Spectrum) -> float:
    """The difference up to which singular values count as nearly equal: ||W_t - W_0||_2, but at most `NEARLY` sigma_1.

    By Wedin's theorem a change of a matrix turns singular vectors by up to its norm over the gap between their singular
    value and the others. Where the gap is smaller than that norm, the matrix determines the subspace and not the
    vectors in it. A large change exceeds most gaps, so that all vectors would be one subspace that cannot turn: hence
    the upper bound, which depends on the values and not on the change. The lower bound, k eps sigma_1, is the rounding
    of a decomposition. The norm comes from a few iterations on random vectors of a fixed seed, and is some percent too
    small at the most.
    """
    sigma_1 = max(now.s[0].item(), start.s[0].item())
    change_MN = (now.U * now.s) @ now.V.t()
    change_MN.addmm_(start.U * start.s, start.V.t(), alpha=-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, s, _ = torch.svd_lowrank(change_MN, q=min(8, len(now.s)), niter=4)
    return max(min(s[0].item(), NEARLY * sigma_1), len(now.s) * torch.finfo(s.dtype).eps * sigma_1)


def _clusters(now: Tensor, start: Tensor, tolerance: float, with_zero: bool) -> tuple[dict[int, Tensor], int | None]:
    """The clusters of partners, label -> indices, and the label of the cluster of those that are nearly zero.

    Every two of a cluster are nearly equal now or were so at the start (complete linkage). If near neighbours were
    enough, chains of them would make one cluster of most of a large matrix. Here a long chain is cut, and mixing across
    the cut counts as turn.

    Args:
        now: singular values (K,).
        start: the singular values of their partners at the start (K,), in the same order.
        with_zero: whether zero is a value that others can be nearly equal to.
    """
    k = len(now)
    both = [torch.cat([s, s.new_zeros(int(with_zero))])[:, None].numpy() for s in (now, start)]
    if len(both[0]) == 1:
        return {1: torch.zeros(1, dtype=torch.long)}, None
    apart = np.minimum(*(pdist(values, "cityblock") for values in both))
    labels = fcluster(linkage(apart, "complete"), tolerance, "distance")
    order = np.argsort(labels[:k], kind="stable")
    found, firsts = np.unique(labels[order], return_index=True)
    members = map(torch.from_numpy, np.split(order, firsts[1:]))
    return dict(zip(found.tolist(), members, strict=True)), int(labels[-1]) if with_zero else None


def condition(s: Tensor) -> float:
    """kappa = sigma_max / sigma_min over the nonzero singular values (SORSA, Theorem 5.6); infinite where none is."""
    kept = s[s > _EPS * torch.linalg.vector_norm(s)]
    return (kept.max() / kept.min()).item() if len(kept) else float("inf")


def orthonormality(factor: Tensor) -> float:
    """||U^T U - I||_F of a factor with R columns, which the regulariser keeps small (SORSA, eq. 9)."""
    gram_RR = factor.t() @ factor
    return torch.linalg.matrix_norm(gram_RR - torch.eye(len(gram_RR), dtype=gram_RR.dtype)).item()


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of s / sum(s) (Roy and Vetterli, 2007), between 1 and K; 0 for the zero matrix."""
    total = s.sum()
    if total == 0:
        return 0.0
    return torch.special.entr(s / total).sum().exp().item()


def stable_rank(s: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2, between 1 and K; 0 for the zero matrix."""
    return (s.square().sum() / s.max().square()).item() if s.max() > 0 else 0.0
