"""Experts that a model holds as one parameter, adapted by SORSA: each family computes what it computed before."""

import copy

import pytest
import torch
from torch import nn

from sorsa_ds.config.schema import SorsaConfig
from sorsa_ds.model.experts import matrices_of
from sorsa_ds.model.targets import choose, insert_sorsa_layers
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa.decompose import decompose, residual, stacked
from sorsa_ds.sorsa.expert_layer import SorsaExperts
from sorsa_ds.sorsa.residual_storage import Dense
from tests.helpers.expert_models import EXPERT_CONFIGS, random_experts

INPUT = torch.arange(1, 49).view(2, 24) % 60


def adapted(model: nn.Module, config: SorsaConfig):
    """A copy of a model with SORSA layers, filled from its weights by the exact decomposition."""
    found = choose(model, config, experts=True)
    new = copy.deepcopy(model)
    insert_sorsa_layers(new, found.targets, config, resolve_precision("fp32", None, "cpu"), Dense(torch.float32))
    for target in found.targets:
        layer = new.get_submodule(target.name)
        parameter = model.get_parameter(target.weight).detach()
        weight = (
            matrices_of(parameter, target.experts, target.transposed)
            if target.experts
            else (parameter.t() if target.transposed else parameter)
        )
        parts = [decompose(matrix, target.rank) for matrix in target.each(weight)]
        rest = [residual(matrix, part) for matrix, part in zip(target.each(weight), parts, strict=True)]
        whole = stacked(parts) if target.experts else parts[0]
        for leaf, value in zip(("U", "s", "V"), whole.tensors(), strict=True):
            setattr(layer, leaf, nn.Parameter(value))
        layer.residual = nn.Parameter(target.joined(rest), requires_grad=False)
        if target.bias:
            layer.bias = nn.Parameter(model.get_submodule(target.name).bias.detach(), requires_grad=False)
    return new, found


@pytest.mark.parametrize("name", EXPERT_CONFIGS)
def test_a_family_computes_what_it_computed_before(name: str):
    model = random_experts(name).eval()
    new, found = adapted(model, SorsaConfig(rank=4, expert_rank=3))
    assert any(isinstance(module, SorsaExperts) for module in new.modules())
    assert not [name for name in found.left_out if ".experts." in name]
    with torch.no_grad():
        before, after = model(INPUT).logits, new(INPUT).logits
    gap = (after - before).abs().max() / before.abs().max()
    assert gap < 1e-5
