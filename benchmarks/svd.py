"""Ways to compute a truncated SVD: seconds and accuracy in one thread, on a model's weights or one large matrix.

    python benchmarks/svd.py                          the seven matrices of one layer of the default model
    python benchmarks/svd.py --size 4096 --rank 128   a square matrix with the spectrum of a real layer
    python benchmarks/svd.py --all-layers             the estimate of the error against the truth, on every matrix

Times are CPU seconds of the thread, the best of --repeat, so that other work on the machine matters little. Printed
beside them are the excess residual energy (||W - U diag(s) V^T||_F^2 - optimum) / optimum in fp64, the worst relative
error of a singular value, and max |U^T U - I|. The last line is one JSON object: per rank, the time of the full SVD and
of svd_lowrank over ours.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sorsa_ds.config.schema import EMBEDDED_MODEL, LoadingConfig
from sorsa_ds.sorsa.decompose import decompose
from sorsa_ds.train.setup import find_model

SPECTRUM_OF = "gate_proj"
"""The matrix whose spectrum the large matrix gets."""

RESOLVED = 1e-5
"""A true excess below this is mostly fp32 rounding, and no estimate is compared with it."""

Triplets = tuple[Tensor, Tensor, Tensor]
FULL, NITER4 = "full SVD (gesdd)", "svd_lowrank niter 4"


@dataclass(slots=True)
class Figures:
    """Figures of one way over several matrices: sums of seconds and of energies, and the worst of the errors."""

    seconds: float = 0.0
    lost: float = 0.0
    optimum: float = 0.0
    singular_value_error: float = 0.0
    orthonormality_error: float = 0.0

    @property
    def excess(self) -> float:
        """(residual energy - optimum) / optimum."""
        return self.lost / self.optimum

    def add(self, seconds: float, W: Tensor, found: Triplets, exact: Tensor) -> None:
        """Add a decomposition `found` of W, whose true singular values are `exact` (fp64)."""
        U, s, V = (x.double() for x in found)
        rank = len(s)
        self.seconds += seconds
        self.optimum += exact[rank:].square().sum().item()
        self.lost += (W.double() - (U * s) @ V.T).square().sum().item() - exact[rank:].square().sum().item()
        self.singular_value_error = max(
            self.singular_value_error, ((s - exact[:rank]).abs() / exact[:rank]).max().item()
        )
        for X in (U, V):
            error = (X.T @ X - torch.eye(rank, dtype=X.dtype)).abs().max().item()
            self.orthonormality_error = max(self.orthonormality_error, error)


def gram_subspace(W: Tensor, rank: int, rounds: int = 2) -> Triplets:
    """Subspace iteration on G = W^T W with as many extra vectors as wanted ones, one QR for two products."""
    G = W.T @ W
    Q = torch.randn(W.shape[1], min(2 * rank, W.shape[1]))
    for _ in range(rounds):
        Q = torch.linalg.qr(G @ (G @ Q))[0]
    return _ritz(W, Q, rank)


def chebyshev(W: Tensor, rank: int, degree: int = 8) -> Triplets:
    """A Chebyshev polynomial in G = W^T W, damping below the smallest Ritz value of a first subspace."""
    G = W.T @ W
    Q = torch.linalg.qr(G @ torch.randn(W.shape[1], min(rank + rank // 2, W.shape[1])))[0]
    GQ = G @ Q
    edge = torch.linalg.eigvalsh(Q.T @ GQ)[0]
    before, now = Q, GQ * (2 / edge) - Q
    for _ in range(degree - 1):
        before, now = now, (G @ now) * (4 / edge) - 2 * now - before
    return _ritz(W, torch.linalg.qr(now)[0], rank)


def _ritz(W: Tensor, Q: Tensor, rank: int) -> Triplets:
    """The best triplets whose right vectors lie in a subspace."""
    U, s, Vh = torch.linalg.svd(W @ Q, full_matrices=False)
    return U[:, :rank], s[:rank], Q @ Vh[:rank].T


def full(W: Tensor, rank: int) -> Triplets:
    """The full SVD, cut at the rank: what PEFT's `pissa` does."""
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], s[:rank], Vh[:rank].T


def ours(method: str, tolerance: float = 1.0) -> Callable[[Tensor, int], Triplets]:
    """The package's own decomposition, by a method and to a tolerance."""

    def run(W: Tensor, rank: int) -> Triplets:
        found = decompose(W, rank, "benchmark", method, tolerance)
        return found.U, found.s, found.V

    return run


def seconds(function: Callable[[], Triplets], repeat: int) -> tuple[float, Triplets]:
    """The thread's CPU seconds of a call, the best of several calls, and its result."""
    best = float("inf")
    for _ in range(repeat):
        start = time.thread_time()
        result = function()
        best = min(best, time.thread_time() - start)
    return best, result


def linears(folder: Path) -> dict[str, Tensor]:
    """The weights of all linears of a model on disk, in fp32, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                if ".layers." in name and name.endswith("_proj.weight"):
                    found[name] = tensors.get_tensor(name).float()
    return found


def with_spectrum_of(W: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A random square matrix with the spectrum of W, interpolated and normalised; and that spectrum (fp64)."""
    s = torch.linalg.svdvals(W.double()).log()
    place = torch.linspace(0, len(s) - 1, size, dtype=torch.float64)
    low = place.long().clamp(max=len(s) - 2)
    spectrum = torch.lerp(s[low], s[low + 1], place - low).exp()
    spectrum = spectrum / spectrum[0]
    draw = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=draw))[0] for _ in range(2))
    return (U * spectrum.float()) @ V.T, spectrum


def compare(matrices: dict[str, Tensor], spectra: dict[str, Tensor], rank: int, args: argparse.Namespace) -> dict:
    """Print the table of one rank; returns its part of the JSON line."""
    ways = {
        FULL: full,
        NITER4: lambda W, r: torch.svd_lowrank(W, q=r, niter=4),
        "Gram subspace, r extra": gram_subspace,
        "Chebyshev on the Gram": chebyshev,
        "ours, exact": ours("exact"),
        **{f"ours, tolerance {t:g}": ours("randomized", t) for t in args.tolerance},
    }
    if args.size:
        del ways["ours, exact"]  # it takes as long as the full SVD
    print(f"\nr = {rank}: {len(matrices)} matrices")
    print(f"{'':26}{'seconds':>10}{'excess':>10}{'s error':>10}{'|UtU-I|':>10}")
    table = {}
    for way, function in ways.items():
        table[way] = row = Figures()
        for name, W in matrices.items():
            repeat = 1 if way == FULL and args.size else args.repeat
            spent, found = seconds(lambda f=function, W=W: f(W, min(rank, *W.shape)), repeat)
            row.add(spent, W, found, spectra[name])
        print(
            f"{way:26}{row.seconds:10.4f}{row.excess:10.1e}"
            f"{row.singular_value_error:10.1e}{row.orthonormality_error:10.1e}",
            flush=True,
        )
    return {
        f"{t:g}": {
            "vs_full_svd": round(table[FULL].seconds / table[key].seconds, 2),
            "residual_energy_excess": float(f"{table[key].excess:.2e}"),
            "vs_svd_lowrank_niter4": round(table[NITER4].seconds / table[key].seconds, 2),
            "niter4_energy_excess": float(f"{table[NITER4].excess:.2e}"),
        }
        for t in args.tolerance
        for key in [f"ours, tolerance {t:g}"]
    }


def audit(matrices: dict[str, Tensor], spectra: dict[str, Tensor], rank: int, args: argparse.Namespace) -> dict:
    """Compare the estimated excess with the true one, matrix by matrix; returns their ratios' extremes."""
    result = {}
    for tolerance in args.tolerance:
        truths, ratios, capped, ways = [], [], 0, 0
        for name, W in matrices.items():
            found = decompose(W, min(rank, *W.shape), name.removesuffix(".weight"), "randomized", tolerance)
            row = Figures()
            row.add(0, W, (found.U, found.s, found.V), spectra[name])
            if found.accuracy.way == "krylov":
                ways += 1
                capped += found.accuracy.capped
                truths.append(row.excess)
                if row.excess > RESOLVED:
                    ratios.append(found.accuracy.excess / row.excess)
        result[f"{tolerance:g}"] = {
            "iterated": ways,
            "capped": capped,
            "worst_excess": float(f"{max(truths, default=0.0):.2e}"),
            "estimate_over_truth": [round(min(ratios, default=1.0), 2), round(max(ratios, default=1.0), 2)],
        }
        print(f"r = {rank}, tolerance {tolerance:g}: {result[f'{tolerance:g}']}", flush=True)
    return result


def main() -> None:
    """Measure, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder, hub name or the embedded model (default)")
    parser.add_argument("--layer", type=int, default=10, help="decoder layer whose matrices are taken")
    parser.add_argument("--all-layers", action="store_true", help="check the estimate on every layer instead")
    parser.add_argument("--size", type=int, help="one square matrix of this size instead")
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--tolerance", type=float, nargs="+", default=[1e-2, 1e-3])
    parser.add_argument("--repeat", type=int, default=5, help="number of runs, of which the best counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    matrices = linears(find_model(args.model, LoadingConfig()))
    if not args.all_layers:
        matrices = {name: W for name, W in matrices.items() if f".layers.{args.layer}." in name}
    if args.size:
        pattern = next(W for name, W in matrices.items() if SPECTRUM_OF in name)
        W, spectrum = with_spectrum_of(pattern, args.size)
        matrices, spectra = {"large": W}, {"large": spectrum}
    else:
        spectra = {name: torch.linalg.svdvals(W.double()) for name, W in matrices.items()}
    job = audit if args.all_layers else compare
    print(json.dumps({f"r{rank}": job(matrices, spectra, rank, args) for rank in args.rank}))


if __name__ == "__main__":
    main()
