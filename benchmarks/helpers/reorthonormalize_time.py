"""The time in which the (r, r) matrices of a re-orthonormalisation are found, per layer, on a batch of layers."""

import statistics
import time

import torch

from benchmarks.helpers.turns import synchronise
from sorsa_ds.sorsa.rotations import rotations

DRIFT, ROUNDS = 1e-3, 3
"""How far, relative to a column, U and V have drifted from orthonormality, and how often it is timed."""


def reorthonormalize_seconds_per_layer(rank: int, layers: int, device: str = "cpu") -> float:
    """The median time, divided by the number of layers, that one process needs for so many layers at once.

    It is the part that takes place on (r, r) matrices in float64. The products with the rows of U and V are the same as
    those of the regulariser's gradient, which is timed by benchmarks/regularizer.py.
    """
    generator = torch.Generator().manual_seed(rank)

    def gram() -> torch.Tensor:
        x = torch.randn(layers, 4 * rank, rank, generator=generator, dtype=torch.float64)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) / (4 * rank) ** 0.5
        x = torch.linalg.qr(x).Q + DRIFT * noise
        return (x.mT @ x).to(device)

    gram_u, gram_v = gram(), gram()
    s = (0.05 + torch.rand(layers, rank, generator=generator, dtype=torch.float64)).to(device)
    rotations(gram_u, s, gram_v)
    seconds = []
    for _ in range(ROUNDS):
        synchronise()
        began = time.perf_counter()
        rotations(gram_u, s, gram_v)
        synchronise()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) / layers
