"""Factors that take the quantisation of the residual into account, as in LoftQ and QPiSSA.

W ~ Q + F with Q the quantised residual and F = U diag(s) V^T; decomposing and quantising take turns:

    F_1 = SVD_r(W)        Q_t = quantise(W - F_t)        F_{t+1} = SVD_r(W - Q_t)

Q follows from F, so only the factors are chosen: those of the round with the smallest ||W - Q_t - F_t||_F.
"""

from dataclasses import asdict, replace
from typing import Any, cast

from torch import Tensor

from sorsa_ds.config.schema import AdapterConfig, ResidualConfig
from sorsa_ds.model.factor_cache import Decompose
from sorsa_ds.model.targets import Target
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa import truncated_svd
from sorsa_ds.sorsa.decompose import Decomposition, residual
from sorsa_ds.sorsa.residual_storage import Storage


def refined(
    decompose: Decompose, adapter: AdapterConfig, config: ResidualConfig, storage: Storage, precision: Precision
) -> Decompose:
    """Repeat a decomposition for `config.iterations` rounds, and keep the factors of the best round.

    The scale alpha / rank of the principal branch is part of F_t.
    """

    def best(target: Target, weight: Tensor) -> Decomposition:
        scale = adapter.scale(target.rank)
        found = decompose(target, weight)
        chosen, least = found, float("inf")
        for left in reversed(range(config.iterations)):
            rest = residual(
                weight, found, used_dtype=precision.compute_dtype, factor_dtype=precision.factor_dtype, scale=scale
            )
            kept = storage.dense(storage.pack(rest), (rest.shape[0], rest.shape[1]), rest.dtype)
            lost = truncated_svd.energy(rest - kept)
            if lost < least:
                # A decomposition of W - Q captures nearly all of W - Q; what is reported is the share of W.
                whole = truncated_svd.energy(weight.to(rest.dtype))
                captured = 1 - truncated_svd.energy(rest) / whole if whole else 1.0
                chosen, least = replace(found, accuracy=replace(found.accuracy, captured=captured)), lost
            if left:
                del rest
                found = decompose(target, kept.neg_().add_(weight).div_(scale))
        return chosen

    return best


def settings(adapter: AdapterConfig, config: ResidualConfig, precision: Precision) -> dict:
    """The settings that decide the refined factors beside those of the decomposition; they enter the cache's key."""
    decides = {"residual": asdict(cast(Any, config)), "precision": precision.name, "alpha": adapter.alpha}
    return decides | ({"rslora": True} if adapter.rslora else {})  # files of before this setting keep their key
