"""Right singular vectors of a matrix: exactly, or the leading ones by block Krylov iteration to a stated tolerance.

Both ways work on a tall W (M, N), M >= N, and leave U to `sorsa_ds.sorsa.decompose`. The measurements behind the
choices made here are in docs/results/svd.md.

Shapes, used as suffixes of tensor names: M, N sides of W, M >= N; R rank; B vectors of a block; K vectors of the
basis so far. Vectors are rows: on CPUs, products of W with few vectors are up to ten times faster that way.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

NEGLIGIBLE_TAIL = 1e-6
"""An optimal residual energy below this share of the matrix's energy counts as this share: fp32 resolves no less."""

SAFETY_WHOLE, SAFETY_HALF = 2.0, 1.5
"""Factors of safety on the estimate of the excess, for blocks as wide as the rank and for blocks half as wide. Without
them the true excess was up to 1.9 and 1.5 times the estimate on a model's 210 matrices (docs/results/svd.md)."""

SMALL_TAIL = 1e-3
"""Where the residual energy is below this share of the matrix's energy, the Ritz values are computed in fp64."""

PROBE_VECTORS = 16
"""Number of fresh random vectors that look for directions which a block narrower than the rank may have missed."""

GRAM_ROWS = 4096
"""Number of rows of W that are converted to fp64 at a time."""


@dataclass(slots=True)
class Search:
    """What `krylov` found.

    V_RN: the vectors, as orthonormal rows.
    image_RM: V W^T.
    excess: the estimate of (residual energy - optimum) / optimum, which is compared with the tolerance.
    iterations: blocks of the basis.
    met: whether the tolerance was reached before the cap on iterations.
    """

    V_RN: Tensor
    image_RM: Tensor
    excess: float
    iterations: int
    met: bool


def energy(W_MN: Tensor) -> float:
    """||W||_F^2. Row norms in W's dtype, summed in fp64, are as exact as fp64 throughout and thirty times faster."""
    return torch.linalg.vector_norm(W_MN, dim=1).double().square().sum().item()


def block_vectors(rank: int) -> int:
    """The number of vectors of a Krylov block.

    It is half the rank where that is still wide enough for fast products: a basis of the same size then holds
    polynomials in W^T W of twice the degree. With small ranks a block as wide as the rank converges as fast, and no
    probe for missed directions is needed.
    """
    return 8 * math.ceil((rank if rank <= 32 else rank / 2) / 8)


def expected_iterations(rank: int, tolerance: float) -> int:
    """The smallest number of iterations that the weights of language models have needed."""
    return max(2, (3 if rank <= 32 else 5) + round(-math.log10(tolerance) - 2))


def prefers_exact(M: int, N: int, rank: int, tolerance: float) -> bool:
    """Whether `exact` is expected to take less time than `krylov` for a tall W (M, N).

    Costs are counted in multiply-adds of a large fp32 product. A multiply-add in fp64 counts twice; an
    eigendecomposition of order n takes as long as 12 n^3 of them in fp64, and half as long in fp32.
    """
    B = block_vectors(rank)
    K = B * expected_iterations(rank, tolerance)
    direct = 2 * M * N * N + 12 * N**3
    iterative = 2 * M * N * (K + B) + 10 * K**3 + 2 * (M + N) * K * K
    return direct <= iterative or K + B > 0.75 * N


def search_bytes(M: int, N: int, rank: int, tolerance: float, iterate: bool) -> int:
    """The bytes that a decomposition takes besides the fp32 matrix itself.

    `exact` needs the fp64 Gram matrix, its eigenvectors, LAPACK's workspace (2 N^2) and a block of rows in fp64;
    `krylov` needs the basis with its image, enlarged once, and a few blocks.

    Args:
        iterate: whether `krylov` is meant.
    """
    if not iterate:
        return 8 * (4 * N * N + GRAM_ROWS * N)
    width = block_vectors(rank)
    K = width * (expected_iterations(rank, tolerance) + 1)
    return 4 * (M + N) * (5 * K // 2 + 4 * width) + 24 * K * K


def exact(W_MN: Tensor, rank: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Right singular vectors V (R, N) from number `first` on, and V W^T (R, M).

    They come from the fp64 Gram matrix of an fp32 W, or by gesdd for fp64. The Gram matrix squares the condition
    number. For an fp32 W its fp64 rounding moves s_i by no more than an SVD in fp32 would, down to s_i = 1e-8 s_1. For
    an fp64 W that would not be accurate enough. The leading ones are returned in W's dtype. The others are in fp64:
    in fp32 the rounding of their image, relative to s_1, would be large beside their own s.
    """
    if W_MN.dtype == torch.float64:
        V_RN = torch.linalg.svd(W_MN, full_matrices=False)[2][first : first + rank]
        return V_RN, V_RN @ W_MN.t()
    gram_NN = torch.zeros(W_MN.shape[1], W_MN.shape[1], dtype=torch.float64, device=W_MN.device)
    for rows in W_MN.split(GRAM_ROWS):
        wide = rows.double()
        gram_NN.addmm_(wide.t(), wide)
    end = gram_NN.shape[0] - first
    V_RN = torch.linalg.eigh(gram_NN)[1][:, end - rank : end].flip(1).t()
    if first == 0:
        V_RN = V_RN.to(W_MN.dtype)
        return V_RN, V_RN @ W_MN.t()
    return V_RN, torch.cat([V_RN @ rows.double().t() for rows in W_MN.split(GRAM_ROWS)], dim=1)


class _Basis:
    """An orthonormal basis Q (K, N) that grows by blocks, with its image Q W^T (K, M) and H = image image^T (K, K)."""

    def __init__(self, W_MN: Tensor, vectors: int):
        self.W_MN, self.size = W_MN, 0
        self._Q_KN = W_MN.new_empty(vectors, W_MN.shape[1])
        self._image_KM = W_MN.new_empty(vectors, W_MN.shape[0])
        self._H_KK = W_MN.new_empty(vectors, vectors)

    def orthonormalise(self, X_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Q' and L' with X = X Q^T Q + L' Q', for a new orthonormal block Q'.

        Q' is orthonormal and orthogonal to the basis also where X lies within the basis.
        """
        Q_KN = self._Q_KN[: self.size]
        enough = 1e-3 * torch.linalg.vector_norm(X_BN, dim=1).max()
        L_BB: Tensor | None = None
        for _ in range(5):
            for _ in range(2):  # once would leave rounding errors that cancellation has magnified
                X_BN = torch.addmm(X_BN, X_BN @ Q_KN.t(), Q_KN, alpha=-1)
            Q_NB, R_BB = torch.linalg.qr(X_BN.t())
            X_BN = Q_NB.t().contiguous()
            L_BB = R_BB.t() if L_BB is None else L_BB @ R_BB.t()
            if R_BB.diagonal().abs().min() > enough:
                break
            # Vectors that had (nearly) vanished are now rounding errors, or whatever QR fills in. They are made
            # orthogonal once more, until at least half of each, now a unit vector, lies outside the basis.
            enough = 0.5
        assert L_BB is not None
        return X_BN, L_BB

    def append(self, X_BN: Tensor) -> Tensor:
        """Add an orthonormal block X (B, N) to the basis, and return X W^T W (B, N)."""
        old, new = self.size, self.size + X_BN.shape[0]
        if new > len(self._Q_KN):
            self._grow(new + new // 2)
        self.size = new
        self._Q_KN[old:new] = X_BN
        image_BM = self._image_KM[old:new]
        torch.mm(X_BN, self.W_MN.t(), out=image_BM)
        added_BK = image_BM @ self._image_KM[:new].t()
        self._H_KK[old:new, :new] = added_BK
        self._H_KK[:new, old:new] = added_BK.t()
        return image_BM @ self.W_MN

    def _grow(self, vectors: int) -> None:
        """Make room for so many vectors in all."""
        more = vectors - len(self._Q_KN)
        self._Q_KN, self._image_KM = (
            torch.cat([old, old.new_empty(more, old.shape[1])]) for old in (self._Q_KN, self._image_KM)
        )
        self._H_KK = torch.nn.functional.pad(self._H_KK, (0, more, 0, more))

    def ritz(self, energy: float, rank: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues (K,) of W^T W within the basis, descending, and the coordinates of their vectors (K, K).

        They are computed in fp64 where in fp32 the squares of the small singular values would drown in the rounding
        of the large ones.
        """
        theta_K, S_KK = torch.linalg.eigh(self._H_KK[: self.size, : self.size])
        if energy - theta_K[-rank:].sum() < SMALL_TAIL * energy:
            image_KM = self._image_KM[: self.size].double()
            theta_K, S_KK = torch.linalg.eigh(image_KM @ image_KM.t())
        return theta_K.flip(0).double(), S_KK.flip(1).t()

    def vectors(self, S_RK: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors V (R, N) with the given coordinates in the basis, and V W^T (R, M)."""
        S_RK = S_RK.to(self.W_MN.dtype)
        V_RN = S_RK @ self._Q_KN[: self.size]
        # Rounding errors add up over the blocks. One Newton step of the polar decomposition squares their sum.
        eye_RR = torch.eye(len(V_RN), dtype=V_RN.dtype, device=V_RN.device)
        correction_RR = torch.addmm(eye_RR, V_RN, V_RN.t(), beta=1.5, alpha=-0.5)
        return correction_RR @ V_RN, correction_RR @ (S_RK @ self._image_KM[: self.size])


def excess_estimate(theta_K: Tensor, rho_R: Tensor, energy: float) -> float:
    """(residual energy - optimum) / optimum, from Ritz values theta and residual norms rho = ||W^T W v - theta v||.

    Let eta be the largest eigenvalue of W^T W outside the basis. Where eta < theta_R, the Schur complement gives
    lambda_i <= lambda_i(Theta + E^T E / (theta_i - eta)), with the vectors W^T W v - theta v as columns of E. To second
    order theta_i therefore falls short by at most rho_i^2 / (theta_i - eta), and where that gap closes, rho_i bounds
    the distance to an eigenvalue. eta cannot be known without the full spectrum; the Ritz value a tenth of the rank
    past the cut stands in for it. The result is thus an estimate and not a bound; a factor of safety puts it above the
    true excess on a language model's matrices (docs/results/svd.md).
    """
    rank = len(rho_R)
    theta_R, eta = theta_K[:rank], theta_K[min(rank + rank // 10, len(theta_K) - 1)]
    gap_R = (theta_R - eta).clamp(min=torch.finfo(torch.float64).tiny)
    safety = SAFETY_WHOLE if block_vectors(rank) >= rank else SAFETY_HALF
    shortfall = safety * torch.minimum(rho_R, rho_R.square() / gap_R).sum().item()
    optimum = max(energy - theta_R.sum().item() - shortfall, NEGLIGIBLE_TAIL * energy)
    return shortfall / optimum


class _RandomBlocks:
    """Gaussian vectors, multiplied once by W^T W. The same name gives the same vectors on every rank and device."""

    def __init__(self, W_MN: Tensor, name: str):
        self._W_MN = W_MN
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
        self._draw = torch.Generator().manual_seed(seed)  # on the CPU, wherever W is

    def take(self, vectors: int) -> Tensor:
        """The next vectors (B, N)."""
        X_BN = torch.randn(vectors, self._W_MN.shape[1], generator=self._draw, dtype=self._W_MN.dtype)
        return _squared(self._W_MN, X_BN.to(self._W_MN.device))


def _squared(W_MN: Tensor, X_BN: Tensor) -> Tensor:
    """X W^T W (B, N)."""
    return X_BN @ W_MN.t() @ W_MN


def _missed(basis: _Basis, probe_BN: Tensor, theta_R: Tensor, energy: float) -> float:
    """The excess residual energy for which directions outside the basis account, from one more product with W^T W.

    Each direction of the probe stands for rank / PROBE_VECTORS directions that there may be.
    """
    X_BN = basis.orthonormalise(probe_BN)[0]
    X_BN = basis.orthonormalise(_squared(basis.W_MN, X_BN))[0]
    outside_B = torch.linalg.svdvals(X_BN @ basis.W_MN.t()).double().square()
    gain = (outside_B - theta_R[-1]).clamp(min=0).sum().item() * max(1.0, len(theta_R) / PROBE_VECTORS)
    return gain / max(energy - theta_R.sum().item(), NEGLIGIBLE_TAIL * energy)


def krylov(W_MN: Tensor, energy: float, rank: int, name: str, tolerance: float, max_iterations: int) -> Search | None:
    """Leading singular vectors by Rayleigh-Ritz on the block Krylov space of W^T W, from a random block.

    Args:
        energy: ||W||_F^2.
        name: seeds the random numbers.

    Returns:
        None where the basis would outgrow W before the tolerance is met: `exact` is cheaper then.
    """
    random, width = _RandomBlocks(W_MN, name), block_vectors(rank)
    basis = _Basis(W_MN, width * (expected_iterations(rank, tolerance) + 1))
    block_BN = basis.orthonormalise(random.take(width))[0]
    next_check, complete = expected_iterations(rank, tolerance), width >= rank
    earlier: tuple[int, float] | None = None  # the iteration of the last check, and the excess found there
    for iteration in range(1, max_iterations + 1):
        last = len(block_BN)
        if basis.size + last > W_MN.shape[1]:
            return None
        block_BN, coupling_BB = basis.orthonormalise(basis.append(block_BN))
        if iteration < min(next_check, max_iterations):
            continue
        if basis.size < rank:
            return None
        theta_K, S_KK = basis.ritz(energy, rank)
        rho_R = torch.linalg.vector_norm(S_KK[:rank, -last:].to(coupling_BB.dtype) @ coupling_BB, dim=1).double()
        excess = excess_estimate(theta_K, rho_R, energy)
        met = excess <= tolerance
        if met and not complete:
            complete = True
            if _missed(basis, random.take(PROBE_VECTORS), theta_K[:rank], energy) > tolerance:
                # More singular values are (nearly) equal than the block has vectors: the block is widened.
                block_BN = basis.orthonormalise(torch.cat([block_BN, random.take(width)]))[0]
                met, earlier = False, None
        if met or iteration == max_iterations:
            return Search(*basis.vectors(S_KK[:rank]), excess, iteration, met)
        next_check = iteration + _iterations_left(excess, tolerance, earlier, iteration)
        earlier = (iteration, excess)
    return None


def _iterations_left(excess: float, tolerance: float, earlier: tuple[int, float] | None, iteration: int) -> int:
    """The number of iterations until another look at the Ritz values is worth its cost.

    It is smaller than the rate of convergence so far suggests, because convergence speeds up.
    """
    if earlier is None or not tolerance < excess < earlier[1]:
        return 1
    rate = math.log(earlier[1] / excess) / (iteration - earlier[0])
    return max(1, int(0.8 * math.log(excess / tolerance) / rate))
