"""Where the initial factors of a layer come from: decomposition, rounds of quantisation, cache, or given tensors."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sorsa_ds.config.schema import AdapterConfig, ResidualConfig, SorsaConfig
from sorsa_ds.model import quantisation_rounds
from sorsa_ds.model.factor_cache import FactorCache
from sorsa_ds.model.fill import FactorSource
from sorsa_ds.model.input_directions import InputDirections
from sorsa_ds.model.targets import Target, factor_shapes
from sorsa_ds.runtime.cache import cache_folder
from sorsa_ds.runtime.console import note
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.decompose import Decomposition, Factors, decompose, decompose_within, stacked
from sorsa_ds.sorsa.residual_storage import Storage


def factor_source(
    config: SorsaConfig, adapter: AdapterConfig, residual: ResidualConfig, storage: Storage, precision: Precision
) -> FactorSource:
    """The decomposition of the configured kind, in `residual.iterations` rounds, cached unless `svd_cache` is `off`."""

    @cache
    def directions(path: str) -> InputDirections:
        return InputDirections(path)

    def decomposed(target: Target, weight: Tensor) -> Decomposition:
        if config.directions is not None:
            directions_RN = directions(config.directions).of(target.name, weight, target.rank)
            return decompose_within(weight, directions_RN, target.name)
        first = config.first_triplet(target.out_features, target.in_features, target.rank)
        return decompose(
            weight, target.rank, target.name, config.svd, config.svd_tolerance, config.svd_max_iterations, first
        )

    repeated = residual.iterations > 1
    single = quantisation_rounds.refined(decomposed, adapter, residual, storage, precision) if repeated else decomposed

    def found(target: Target, weight: Tensor, digest: str | None = None) -> Decomposition:
        if not target.experts:
            return single(target, weight)
        return stacked([single(target.one(number), matrix) for number, matrix in enumerate(weight)])

    if config.svd_cache == "off" or config.directions is not None:
        return found  # what directions leave to decompose takes less time than a cache's digest of the weight
    folder = cache_folder() / "factors" if config.svd_cache == "auto" else Path(config.svd_cache).expanduser()
    settings: dict[str, Any] = {"method": config.svd}
    if config.svd == "randomized":
        settings |= {"tolerance": config.svd_tolerance, "max_iterations": config.svd_max_iterations}
    if config.triplets != "leading":
        settings |= {"triplets": config.triplets, "window_start": config.window_start}
    if repeated:
        settings |= quantisation_rounds.settings(adapter, residual, precision)
    return FactorCache(folder, settings, note).wrap(found)


def from_values(values: Callable[[str, torch.Size], Tensor]) -> FactorSource:
    """The source that takes each factor from `values`, which gives a tensor by its name and shape."""

    def given(target: Target, weight: Tensor, digest: str | None = None) -> Factors:
        shapes = factor_shapes(target).items()
        return Factors(*(values(f"{target.name}.{leaf}", shape).to(weight.device) for leaf, shape in shapes))

    return given
