"""Factors that take quantisation into account: W ~ Q + U diag(s) V^T, alternately (as LoftQ and QPiSSA do).

    F_1 = SVD_r(W)        Q_t = quantise(W - F_t)        F_{t+1} = SVD_r(W - Q_t)

Q follows from the factors, so only these are chosen: those whose ||W - Q_t - F_t|| is the least of all rounds.
"""

from dataclasses import asdict, replace

from torch import Tensor

from sorsa_ds.config.schema import ResidualConfig, SorsaConfig
from sorsa_ds.model.factor_cache import Decompose
from sorsa_ds.model.targets import Target, scale_of
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa import truncated_svd
from sorsa_ds.sorsa.decompose import Decomposition, residual
from sorsa_ds.sorsa.residual_storage import Storage


def refined(
    decompose: Decompose, sorsa: SorsaConfig, config: ResidualConfig, storage: Storage, precision: Precision
) -> Decompose:
    """The decomposition repeated against what quantising left; the scale alpha / rank is part of F_t."""

    def best(target: Target, weight: Tensor) -> Decomposition:
        scale = scale_of(target, sorsa)
        found = decompose(target, weight)
        chosen, least = found, float("inf")
        for left in reversed(range(config.iterations)):
            rest = residual(
                weight, found, used_dtype=precision.compute_dtype, scale_dtype=precision.factor_dtype, scale=scale
            )
            kept = storage.dense(storage.pack(rest), tuple(rest.shape), rest.dtype)
            lost = truncated_svd.energy(rest - kept)
            if lost < least:
                # A decomposition of W - Q captures nearly all of that; what counts is its share of W.
                whole = truncated_svd.energy(weight.to(rest.dtype))
                captured = 1 - truncated_svd.energy(rest) / whole if whole else 1.0
                chosen, least = replace(found, accuracy=replace(found.accuracy, captured=captured)), lost
            if left:
                del rest
                found = decompose(target, kept.neg_().add_(weight).div_(scale))
        return chosen

    return best


def settings(sorsa: SorsaConfig, config: ResidualConfig, precision: Precision) -> dict:
    """What besides the decomposition's own settings decides the refined factors."""
    return {"residual": asdict(config), "precision": precision.name, "alpha": sorsa.alpha}
