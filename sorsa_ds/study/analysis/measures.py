"""The figures of one matrix, and of a matrix W_t against the one that training began with, W_0. Pure functions.

Shapes, used as suffixes of tensor names: M out_features, N in_features, K = min(M, N), R rank. Everything is computed
in the dtype that is given (float64 as `compute` calls it); the results are Python floats without a unit.
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
"""Singular values that differ by more than this share of the largest are never taken as nearly equal."""


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
    """How far singular vectors have turned, each between 0 (not at all) and 1; literal >= matched >= clustered.

    literal: each against the one of the same order (SORSA, eq. 2 to 4). matched: each against its partner under the
    best one-to-one matching, so that mere swapping counts nothing. clustered: partners whose singular values are nearly
    equal taken together, as the subspaces that they span, so that mixing inside these counts nothing either. subspace:
    the leading r left and right vectors taken together.
    """

    literal: float
    matched: float
    clustered: float
    subspace: float

    @property
    def swapping(self) -> float:
        """The share of `literal` that is swapped order or mixing of nearly equal ones and no turn, between 0 and 1."""
        return (self.literal - self.clustered) / self.literal if self.literal > 0 else 0.0


def turn(now: Spectrum, start: Spectrum, rank: int) -> Turn:
    """Delta-D = 1 - (1 / 2k) sum_i (|<u_i, u_i0>| + |<v_i, v_i0>|), and three readings that bear swapping.

    The matching maximises the same sum over all permutations of the indices of W_0. Of clusters C of partners (see
    `tolerance`) the sum is over ||U_C^T U_C0||_* + ||V_C^T V_C0||_*, over cosines of principal angles: any change of
    basis inside a cluster counts nothing. The leading subspaces' figure is the same of one cluster of r, over 2r.

    Where W is not square, the vectors of the longer side that belong to (nearly) zero singular values are any |C| of
    those that are orthogonal to all the others: the others' turn is counted, and that of these counts nothing.

    Args:
        rank: r of the subspaces; at most k is taken.
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
    """Up to which difference singular values are nearly equal: ||W_t - W_0||_2, but at most `NEARLY` sigma_1.

    By Wedin's theorem a change of a matrix turns singular vectors by as much as its norm over the gap between their
    singular value and the others: where the gap is smaller, the matrix tells the subspace and not the vectors in it.
    A large change is larger than most gaps, and all would be one subspace that cannot turn: hence the bound, a
    property of the values and not of the change. What turns between values that lie further apart is a turn.
    At least k eps sigma_1, the rounding of a decomposition. The norm comes from a few iterations on random vectors of a
    fixed seed, to some percent from below.
    """
    sigma_1 = max(now.s[0].item(), start.s[0].item())
    change_MN = (now.U * now.s) @ now.V.t()
    change_MN.addmm_(start.U * start.s, start.V.t(), alpha=-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, s, _ = torch.svd_lowrank(change_MN, q=min(8, len(now.s)), niter=4)
    return max(min(s[0].item(), NEARLY * sigma_1), len(now.s) * torch.finfo(s.dtype).eps * sigma_1)


def _clusters(now: Tensor, start: Tensor, tolerance: float, with_zero: bool) -> tuple[dict[int, Tensor], int | None]:
    """Clusters of partners, label -> their indices, and the label of those that are nearly zero.

    Every two of a cluster are nearly equal now or were so at the start. (Complete linkage. If near neighbours were
    enough, chains of them would make one cluster of most of a large matrix; a chain that is longer is cut, and mixing
    across the cut counts as turn.)

    Args:
        now, start: singular values (K,), those of partners at the same place.
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
