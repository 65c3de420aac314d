"""Experts that a model holds as one parameter, adapted by SORSA: each family computes what it computed before."""

import copy

import pytest
import torch
from torch import nn

from sorsa_ds.config.schema import AdapterConfig
from sorsa_ds.model.experts import matrices_of
from sorsa_ds.model.selection import choose, select_targets
from sorsa_ds.model.targets import insert_sorsa_layers
from sorsa_ds.model.uneven_calls import calls_unevenly
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa.decompose import decompose, residual, stacked
from sorsa_ds.sorsa.expert_layer import SorsaExperts
from sorsa_ds.sorsa.residual_storage import Dense
from tests.helpers.expert_models import MIXTURES, random_experts

DBRX = "transformer.blocks.0.ffn.experts"
INPUT = torch.arange(1, 49).view(2, 24) % 60


def adapted(model: nn.Module, config: AdapterConfig):
    """A copy of a model with SORSA layers, filled from its weights by the exact decomposition."""
    found = choose(model, config)
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


@pytest.mark.parametrize("name", MIXTURES)
def test_a_family_computes_what_it_computed_before(name: str):
    model = random_experts(name).eval()
    new, found = adapted(model, AdapterConfig(rank=4, expert_rank=3))
    assert any(isinstance(module, SorsaExperts) for module in new.modules())
    assert not [name for name in found.left_out if ".experts." in name]
    with torch.no_grad():
        before, after = model(INPUT).logits, new(INPUT).logits
    gap = (after - before).abs().max() / before.abs().max()
    assert gap < 1e-5


def test_adapted_experts_are_called_evenly_whatever_their_class_did():
    model = random_experts("dbrx")
    new, _ = adapted(model, AdapterConfig(rank=4, expert_rank=3))
    first, second = model.get_submodule(DBRX), new.get_submodule(DBRX)
    assert calls_unevenly(first) and not calls_unevenly(second)
    assert isinstance(second, type(first))


def test_the_form_is_the_one_that_the_model_asks_for(monkeypatch):
    model = random_experts("mixtral").eval()
    new, _ = adapted(model, AdapterConfig(rank=4, expert_rank=3))
    forms = []
    whole = SorsaExperts.forward
    monkeypatch.setattr(
        SorsaExperts, "forward", lambda self, x, routes: forms.append(routes.form) or whole(self, x, routes)
    )
    with torch.no_grad():
        wanted = model(INPUT).logits
        for name, form in {"eager": "loop", "grouped_mm": "grouped", "batched_mm": "batched"}.items():
            new.config._experts_implementation = name
            torch.testing.assert_close(new(INPUT).logits, wanted, rtol=1e-4, atol=1e-4)
            assert {*forms} == {form}
            forms.clear()


SETTINGS = [
    ({"experts": "frozen"}, "adapter.experts is frozen"),
    ({"exclude": ["experts.down_proj"]}, "another weight of the same experts is left out"),
]


@pytest.mark.parametrize(("settings", "reason"), SETTINGS)
def test_experts_that_are_left_out_are_told_with_the_reason(settings, reason):
    found = choose(random_experts("mixtral"), AdapterConfig(rank=4, **settings))
    assert not any(target.experts for target in found.targets)
    assert found.left_out["model.layers.0.mlp.experts.gate_up_proj"] == reason
    assert found.share < 0.5 and "Warning: only" in str(found.warning)


def test_without_settings_all_experts_are_adapted_and_the_share_says_so():
    found = choose(random_experts("mixtral"), AdapterConfig(rank=4))
    assert found.share > 0.95 and found.warning is None
    assert found.rows()[0][1].startswith("8 linears, the weights of 12 experts x 4; 9")
    assert [target.rank for target in found.targets if target.experts] == [8] * 4


REFUSED = [
    ({"targets": ["experts.gate_up_proj"]}, "gate_up_proj is adapted, and down_proj of the same experts is not"),
    (
        {"targets": ["gate_up_proj", "down_proj"], "experts": "frozen"},
        "cannot be adapted, since adapter.experts is frozen",
    ),
    ({"expert_rank": 25}, r"rank 25 exceeds min\(out, in\) = 24 of .* \(32 x 24\).*: lower adapter.expert_rank"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_be_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        choose(random_experts("mixtral"), AdapterConfig(rank=4, **settings))


def test_ranks_of_single_experts_weights_by_pattern():
    config = AdapterConfig(rank=4, rank_pattern={"experts.down_proj": 5, "o_proj": 3})
    found = {target.name: target.rank for target in choose(random_experts("mixtral"), config).targets}
    assert found["model.layers.1.mlp.experts.down_proj"] == 5
    assert found["model.layers.1.mlp.experts.gate_up_proj"] == 8
    assert found["model.layers.1.self_attn.o_proj"] == 3


def test_unknown_experts_stay_frozen_with_a_reason():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 32, 16))

    model = nn.Module()
    model.q_proj, model.experts = nn.Linear(16, 16), Experts()
    found = choose(model, AdapterConfig(rank=4))
    assert [target.name for target in found.targets] == ["q_proj"]
    assert found.left_out == {"experts.weight": "its experts are computed in a way that this program does not know"}


def test_a_class_with_a_forward_pass_of_its_own_stays_as_it_is():
    model = random_experts("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.__class__ = type("OwnExperts", (type(experts),), {"forward": lambda self, x, chosen, weights: x})
    found = choose(model, AdapterConfig(rank=4))
    assert {target.name for target in found.targets if target.experts} == {
        f"model.layers.1.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")
    }
    assert "does not know" in found.left_out["model.layers.0.mlp.experts.gate_up_proj"]


def test_linears_alone_can_be_asked_for():
    model = random_experts("mixtral")
    found = select_targets(model, AdapterConfig(rank=4))
    assert found == [target for target in choose(model, AdapterConfig(rank=4)).targets if not target.experts]
    assert found
