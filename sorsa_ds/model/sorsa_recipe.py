"""How SORSA adapts a model: each target linear becomes residual, U, s and V, made by the rank that owns the layer."""

import time
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sorsa_ds.config.schema import AdapterConfig, SorsaConfig
from sorsa_ds.model.fill import TRIM_BYTES, FactorSource, Produced, Recipe, check_finite
from sorsa_ds.model.init_report import LayerReport, QuantisationLoss
from sorsa_ds.model.pretrained import REOPEN_BYTES
from sorsa_ds.model.schedule import Item
from sorsa_ds.model.selection import Selection, choose
from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.model.targets import Target, factor_shapes, insert_sorsa_layers
from sorsa_ds.model.weight_sources import WeightSource
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.numerics import full_fp32_products
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa import truncated_svd
from sorsa_ds.sorsa.decompose import Decomposition, Factors, residual, within_bytes
from sorsa_ds.sorsa.expert_layer import SorsaExperts
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.residual_storage import Storage, stored_bytes


def working_set(target: Target, sorsa: SorsaConfig, storage: Storage, refined: bool = False) -> int:
    """Bytes that a rank holds at most besides its final shards while this layer is made.

    They are: two fp32 matrices of the layer's size with its factors (weight and residual while it is decomposed, the
    outgoing and the incoming message while it is exchanged); what the decomposition itself takes
    (`truncated_svd.search_bytes`, or `sorsa_ds.sorsa.decompose.within_bytes` of given directions); and what was read or
    freed but not yet returned to the system. A quantised residual is made dense once more, to measure its error; with
    several rounds of quantisation (`refined`) the dense matrix is decomposed while the weight is still held. Of
    experts, the matrices are decomposed one after the other, beside the weights, factors and stored residuals of all,
    which are there twice, made and sent. While their weights are read, the stored tensors and what is made of them are
    there at once.
    """
    m, n = target.out_features, target.in_features
    if sorsa.directions is None:
        tall = max(m, n), min(m, n), target.rank, sorsa.svd_tolerance
        may_iterate = sorsa.svd == "randomized" and sorsa.first_triplet(m, n, target.rank) == 0
        iterate = may_iterate and not truncated_svd.prefers_exact(*tall)
        decomposing = truncated_svd.search_bytes(*tall, iterate)
    else:
        decomposing = within_bytes(m, n, target.rank)
    more = 4 * m * n * (storage.quantised + refined)
    all_held = 0
    if target.experts:
        kept = stored_bytes(storage, torch.Size((m, n)))
        all_held = target.experts * max(8 * m * n, 4 * m * n + 2 * kept)
    return (
        8 * (m * n + target.trainable) + more + all_held + decomposing + TRIM_BYTES + REOPEN_BYTES
    )  # fmt: skip


def adapt_to_sorsa(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    precision: Precision,
    storage: Storage,
    device: torch.device,
    factor_source: FactorSource,
    trained: FactorSource | None = None,
) -> tuple[Selection, Recipe]:
    """Make the targets of a model without memory SORSA layers; returns them with the recipe that fills all tensors.

    Args:
        storage: how the residuals are kept.
        device: where decompositions run.
        factor_source: gives the initial factors (`sorsa_ds.model.factor_source`), against which W_r is taken.
        trained: gives the factors that the layers get instead, if training has moved them.

    Raises:
        ValueError: bad targets or ranks.
    """
    selection = choose(model, adapter)
    insert_sorsa_layers(model, selection.targets, adapter, precision, storage)
    return selection, SorsaRecipe(model, precision, storage, device, factor_source, trained)


@dataclass(frozen=True, slots=True)
class SorsaRecipe:
    """SORSA's recipe: a target becomes W_r in its storage, U, s, V and the bias; other parameters are copied.

    Args:
        model: the model with its SorsaLinear layers, which know their scale.
        storage: how the residuals are kept.
        device: where decompositions run.
        factor_source: gives the initial factors, against which W_r is taken.
        trained: gives the factors that the layers get instead, if training has moved them.
    """

    model: nn.Module
    precision: Precision
    storage: Storage
    device: torch.device
    factor_source: FactorSource
    trained: FactorSource | None = None

    def specs(self, item: Item) -> list[TensorSpec]:
        target, dtype = item.target, self.precision.residual_dtype
        if target is None:
            return [TensorSpec(item.name, item.shape, dtype)]
        m, n = target.out_features, target.in_features
        kept = self.storage.tensors(torch.Size((m, n)))
        specs = [
            TensorSpec(f"{target.name}.{leaf}", target.shaped(*shape), kind) for leaf, (shape, kind) in kept.items()
        ]
        for leaf, shape in factor_shapes(target).items():
            specs.append(TensorSpec(f"{target.name}.{leaf}", shape, torch.float32, trainable=True))
        if target.bias:
            specs.append(TensorSpec(f"{target.name}.bias", torch.Size((m,)), dtype))
        return specs

    def produce(self, item: Item, source: WeightSource) -> Produced:
        began = time.perf_counter()
        weight, bias = source.read(item)
        weight = weight.to(self.device)
        target = item.target
        if target is None:
            return [check_finite(item.name, weight)], []
        with full_fp32_products():
            factors = self.factor_source(target, weight, source.digest(target))
        given = not isinstance(factors, Decomposition)  # then there is nothing to report
        parts, losses = [], []
        for matrix, *own in zip(target.each(weight), *(target.each(x) for x in factors.tensors()), strict=True):
            rest = self._residual(target, matrix, Factors(*own))
            parts.append(self.storage.pack(rest))
            if self.storage.quantised and not given:
                losses.append(QuantisationLoss.of(self.storage, matrix, rest, parts[-1]))
        now = factors if self.trained is None else self.trained(target, weight)
        tensors = [*(target.joined(kept) for kept in zip(*parts, strict=True)), *now.tensors()]
        if bias is not None:
            tensors.append(bias.to(self.device))
        if given:
            return tensors, []
        assert isinstance(factors, Decomposition)
        loss = QuantisationLoss.mean(losses) if losses else None
        seconds = time.perf_counter() - began
        return tensors, [LayerReport.of(target, factors, collectives.rank(), seconds, tensors, loss)]

    def _residual(self, target: Target, matrix: Tensor, factors: Factors) -> Tensor:
        """W_r (M, N) in fp32 of one matrix, against the factors as they are used."""
        with full_fp32_products():
            return residual(
                matrix,
                factors,
                used_dtype=self.precision.compute_dtype,
                factor_dtype=self.precision.factor_dtype,
                scale=cast(SorsaLinear | SorsaExperts, self.model.get_submodule(target.name)).scale,
            )
