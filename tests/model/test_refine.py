"""Quantisation and decomposition in turns, on real weights: below plain quantisation, falling with rounds and rank."""

import json

import pytest
import torch
from safetensors import safe_open

from sorsa_ds.config.schema import AdapterConfig, ResidualConfig, SorsaConfig
from sorsa_ds.model.factor_source import factor_source
from sorsa_ds.model.init_report import as_json, table
from sorsa_ds.model.sharding import Whole
from sorsa_ds.model.targets import Target
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa.residual_storage import resolve_storage
from sorsa_ds.train.start_check import largest_gap
from tests.helpers.architectures import exactly, save
from tests.helpers.sorsa_models import load_sorsa_model

CPU = torch.device("cpu")
LAYERS = ["model.layers.3.self_attn.q_proj", "model.layers.20.self_attn.v_proj", "model.layers.12.mlp.down_proj"]
FP32 = resolve_precision("fp32", None, "cpu")


@pytest.fixture(scope="module")
def weights(embedded_model):
    """A few of the default model's weights, by layer."""
    with safe_open(embedded_model / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(f"{name}.weight").float() for name in LAYERS}


def refined(weight, name, rank, rounds, *, storage="nf4", alpha=None, precision=FP32, cache="off"):
    """The factors that a run would start from, and what is lost then: ||W - (Q + U s V^T)|| / ||W||, in float64."""
    config, sorsa = ResidualConfig(storage=storage, iterations=rounds), SorsaConfig(svd_cache=cache)
    kept = resolve_storage(config, precision, CPU)
    target = Target(name, *weight.shape, rank, False, False)
    factors = factor_source(sorsa, AdapterConfig(alpha=alpha), config, kept, precision)(target, weight)
    U, V = (x.to(precision.compute_dtype).double() for x in (factors.U, factors.V))
    principal = (alpha / rank if alpha else 1.0) * (U * factors.s.double()) @ V.T
    rest = (weight - principal).float()
    lost = rest - kept.dense(kept.pack(rest), tuple(rest.shape), torch.float32)
    return factors, (lost.double().norm() / weight.double().norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("storage", ["nf4", "nf4_double", "int8"])
def test_the_error_is_below_plain_quantisation_and_falls_with_rounds_and_rank(weights, name, storage):
    weight = weights[name]
    kept = resolve_storage(ResidualConfig(storage=storage), FP32, CPU)
    plain = ((weight - kept.dense(kept.pack(weight), tuple(weight.shape), torch.float32)).norm() / weight.norm()).item()
    errors = {(r, t): refined(weight, name, r, t, storage=storage)[1] for r in (16, 64) for t in (1, 3)}
    assert errors[16, 1] < 0.97 * plain
    assert errors[64, 1] < 0.9 * errors[16, 1]
    if storage != "int8":  # its error is a sixteenth, so that there is little for the principal part to take up
        assert errors[16, 3] < 0.97 * errors[16, 1]
        assert errors[64, 3] < 0.95 * errors[64, 1]
    assert all(errors[r, 3] <= errors[r, 1] * 1.0001 for r in (16, 64))


@pytest.mark.slow
def test_refined_factors_are_a_decomposition_of_what_quantising_left(weights):
    weight = weights[LAYERS[1]]
    first, _ = refined(weight, LAYERS[1], 8, 1)
    kept = resolve_storage(ResidualConfig(storage="nf4"), FP32, CPU)
    rest = (weight.double() - (first.U.double() * first.s.double()) @ first.V.double().T).float()
    left = weight - kept.dense(kept.pack(rest), tuple(rest.shape), torch.float32)
    second, _ = refined(weight, LAYERS[1], 8, 2)
    eye = torch.eye(8)
    for X in (second.U, second.V):
        torch.testing.assert_close(X.T @ X, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(second.s, torch.linalg.svdvals(left)[:8], rtol=5e-3, atol=0)
    energy = 1 - (weight - (second.U * second.s) @ second.V.T).norm() ** 2 / weight.norm() ** 2
    assert second.accuracy.captured == pytest.approx(energy.item(), abs=1e-5), "its share of W, not of W - Q"


@pytest.mark.slow
def test_rounds_go_with_a_scale_and_with_rounded_factors(weights):
    weight = weights[LAYERS[1]]
    once, thrice = (refined(weight, LAYERS[1], 16, t, alpha=8.0)[1] for t in (1, 3))
    assert thrice < 0.9 * once  # with half the factors in W_r, the second round has the more to give
    mixed = resolve_precision("mixed", None, "cpu")
    assert refined(weight, LAYERS[1], 16, 3, precision=mixed)[1] < 0.97 * refined(weight, LAYERS[1], 16, 1)[1]


@pytest.mark.slow
def test_the_cache_knows_the_quantisation(weights, tmp_path):
    weight = weights[LAYERS[1]]

    def files(storage, rounds, precision=FP32):
        refined(weight, LAYERS[1], 8, rounds, storage=storage, precision=precision, cache=str(tmp_path))
        return len(list(tmp_path.iterdir()))

    assert files("nf4", 1) == 1
    assert files("int8", 1) == 1, "one round does not depend on the quantisation"
    assert files("nf4", 2) == 2
    assert files("nf4", 2) == 2
    assert files("nf4", 3) == 3
    assert files("nf4_double", 2) == 4
    assert files("nf4", 2, resolve_precision("mixed", None, "cpu")) == 5


def test_the_report_has_both_errors(tmp_path):
    folder = save("llama", tmp_path / "m")
    storage = resolve_storage(ResidualConfig(storage="nf4"), FP32, CPU)
    loaded = load_sorsa_model(
        folder, adapter=AdapterConfig(rank=8), precision=FP32, placement=Whole(CPU), device=CPU,
        factor_source=exactly, storage=storage,
    )  # fmt: skip
    written = json.loads(json.dumps(as_json(loaded.reports, seconds=1.0, world_size=1, peak_gib=[1.0])))
    for target, report in zip(loaded.targets, written["layers"], strict=True):
        weight = loaded.source.weight(target).double()
        layer = loaded.model.get_submodule(target.name)
        kept = storage.dense([layer.residual, layer.residual_scales], tuple(weight.shape), torch.float32).double()
        whole = kept + (layer.U * layer.s).double() @ layer.V.double().T
        plain = storage.dense(storage.pack(weight.float()), tuple(weight.shape), torch.float32)
        assert report["loss"]["error"] == pytest.approx(((weight - whole).norm() / weight.norm()).item(), rel=1e-3)
        assert report["loss"]["plain_error"] == pytest.approx(
            ((weight - plain).norm() / weight.norm()).item(), rel=1e-3
        )
        assert report["loss"]["error"] < report["loss"]["plain_error"]
    head, line = table(loaded.reports).splitlines()[:2]
    assert head.split()[-3:] == ["error", "plain", "way"]
    assert line.count("%") == 3


def test_a_4_bit_start_may_be_further_off():
    assert largest_gap(None, "bf16") == largest_gap(None, "int8") == 0.02
    assert largest_gap(None, "nf4") == largest_gap(None, "nf4_double") == 0.5
    assert largest_gap(0.1, "nf4") == 0.1
