"""Runs with adapted experts as LoRAs, adapters and plain models: checked by transformers, PEFT and plain torch."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sorsa_ds import load_adapter
from sorsa_ds.evaluate import models
from sorsa_ds.export.command import Options, export
from sorsa_ds.model import adapter_file
from tests.helpers.distances import relative
from tests.helpers.expert_models import save_experts
from tests.helpers.finished import base_of, finished_run

INPUT = torch.arange(1, 49).view(2, 24) % 60
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each family of mixtures, by name and settings; made when it is asked for."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(name: str, **settings) -> Path:
        key = str((name, settings))
        if key not in made:
            base = root / "models" / name
            if not base.exists():
                save_experts(name, base)
            made[key] = finished_run(
                base, root / f"run-{len(made)}", **{"rank": 3, "expert_rank": 2, "alpha": 6.0} | settings
            )
        return made[key]

    return run


def logits(model) -> torch.Tensor:
    """The logits of a model on a fixed input."""
    with torch.no_grad():
        return model.eval()(INPUT).logits.float()


def plainly(folder: Path):
    """transformers' own loader."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


FAMILIES = {
    "mixtral": {"rank_pattern": {"layers.0.mlp.experts.down_proj": 1, "layers.1.self_attn.q_proj": 1}},
    "qwen2_moe": {},
    "glm4_moe": {},  # its first block and its shared expert have linears with names that PEFT takes for experts'
    "qwen3_moe": {"targets": ["experts.gate_up_proj", "experts.down_proj"]},
    "gpt_oss": {},
    "llama4": {"expert_rank": 4},
}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_computes_with_the_lora_what_the_trained_model_computes(runs, tmp_path, name):
    run = runs(name, **FAMILIES[name])
    trained = logits(load_adapter(run / "adapter"))
    base = plainly(base_of(run))
    assert relative(logits(base), trained) > 0.1
    export(Options(run, "lora", tmp_path / "lora"))
    assert relative(logits(PeftModel.from_pretrained(base, tmp_path / "lora")), trained) < 1e-5
    evaluated = models.find_evaluated_model(str(tmp_path / "lora")).load(CPU, torch.float32)
    assert relative(logits(evaluated), trained) < 1e-5
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "target_parameters" in card and "serve `--format merged`" in card


def test_peft_warns_of_ranks_of_parameters_only_where_the_card_says_so(runs, tmp_path):
    for name, told in (("gpt_oss", False), ("mixtral", True)):
        run = runs(name, **FAMILIES[name])
        export(Options(run, "lora", tmp_path / name))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(plainly(base_of(run)), tmp_path / name)
        assert any("were ignored" in str(warning.message) for warning in caught) == told
        assert ("PEFT warns that patterns" in (tmp_path / name / "README.md").read_text()) == told


def test_a_lora_is_cut_to_a_rank_with_the_smallest_error_of_all_experts(runs, tmp_path):
    run = runs("qwen3_moe", **FAMILIES["qwen3_moe"])
    export(Options(run, "lora", tmp_path / "cut", rank=2))
    told = json.loads((tmp_path / "cut" / "truncation.json").read_text())["layers"]
    initial, trained = (load_file(run / "adapter" / file) for file in (adapter_file.INITIAL, adapter_file.TRAINED))
    for name, error in told.items():

        def product(factors, name=name):
            U, s, V = (factors[f"{name}.{leaf}"].double() for leaf in "UsV")
            return torch.einsum("emr,er,enr->emn", U, s, V)

        values = torch.linalg.svdvals(product(trained) - product(initial))
        assert error == pytest.approx((values[:, 2:].norm() / values.norm()).item(), rel=1e-5)
        assert 0.01 < error < 1
    tensors = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {12 * 2}


@pytest.mark.parametrize("name", ["mixtral", "dbrx"])
def test_what_peft_cannot_carry_is_refused_before_anything_is_written(runs, tmp_path, monkeypatch, name):
    if name == "mixtral":
        monkeypatch.setattr("sorsa_ds.run.peft_files.lora.as_parameters", lambda *_: [])
        reason = "PEFT would not find .*down_proj.lora_A.weight again, nor 7 other .*--format merged"
    else:
        reason = r"mlp.w1 holds the weights of 4 experts in two dimensions, .* one matrix; --format merged"
    with pytest.raises(ValueError, match=reason):
        export(Options(runs(name), "lora", tmp_path / "lora"))
    assert not (tmp_path / "lora").exists()


def layers_by_hand(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights of experts (E, M, N), from the base model's own, in float64."""
    initial, trained = (load_file(run / "adapter" / file) for file in (adapter_file.INITIAL, adapter_file.TRAINED))
    described, base = adapter_file.read_description(run / "adapter"), plainly(base_of(run))
    merged = {}
    for name, shape in described.layers.items():
        if "experts" in shape:
            weight = base.get_parameter(name).detach().double()
            weight = weight.view(shape["experts"], -1, weight.shape[-1])
            turned = type(base.get_submodule(name.rpartition(".")[0])).__name__.startswith(("GptOss", "Llama4"))
            turned = turned or name.endswith("w2")
            start, end = (
                torch.einsum("emr,er,enr->emn", *(factors[f"{name}.{leaf}"].double() for leaf in "UsV"))
                for factors in (initial, trained)
            )
            change = described.adapter.alpha / shape["rank"] * (end - start)
            merged[name] = weight + (change.mT if turned else change)
    return merged


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "dbrx", "granitemoe"])
def test_experts_are_merged_in_memory_and_compute_as_their_class_does(runs, name):
    run = runs(name, **FAMILIES.get(name, {}))
    by_hand, base = layers_by_hand(run), plainly(base_of(run))
    adapted = load_adapter(run / "adapter")
    trained = logits(adapted)
    assert relative(logits(base), trained) > 0.1
    merged = models.find_evaluated_model(str(run)).load(CPU, torch.float32)
    assert relative(logits(merged), trained) < 1e-5
    assert {type(module) for module in merged.modules()} == {type(module) for module in base.modules()}
    assert merged.state_dict().keys() == base.state_dict().keys()
    for weight, expected in by_hand.items():
        found = merged.get_parameter(weight)
        assert found.shape == base.get_parameter(weight).shape and found.is_contiguous()
        assert relative(found.double(), expected.view(found.shape)) < 1e-6
    halved = models.find_evaluated_model(str(run)).load(CPU, torch.bfloat16)
    for weight, values in merged.named_parameters():
        assert torch.equal(halved.get_parameter(weight), values.bfloat16()), weight


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_over_a_quantised_residual_the_lora_is_exact_on_the_model_that_base_writes(runs, tmp_path, name):
    run = runs(name, storage="nf4", **FAMILIES[name])
    adapted = models.find_evaluated_model(str(run)).load(CPU, None)
    trained = logits(adapted)
    assert any(".experts." in name and value.dtype == torch.uint8 for name, value in adapted.named_parameters())
    kept = models.find_evaluated_model(str(run)).load(CPU, torch.float32)
    assert relative(logits(kept), trained) < 1e-5, "factors stay apart over what is packed"
    for form in ("merged", "base"):
        export(Options(run, form, tmp_path / form, dtype="float32"))
    export(Options(run, "lora", tmp_path / "lora"))
    base = plainly(tmp_path / "base")
    assert relative(logits(base), trained) > 0.1
    assert relative(logits(plainly(tmp_path / "merged")), trained) < 1e-5
    assert relative(logits(PeftModel.from_pretrained(base, tmp_path / "lora")), trained) < 1e-5


def test_the_adapter_itself_is_copied_and_loads(runs, tmp_path):
    run = runs("mixtral", **FAMILIES["mixtral"])
    export(Options(run, "adapter", tmp_path / "adapter"))
    assert torch.equal(logits(load_adapter(tmp_path / "adapter")), logits(load_adapter(run / "adapter")))


def test_quantised_exports_keep_experts_dense_and_say_so(runs, tmp_path, capsys):
    run = runs("mixtral", **FAMILIES["mixtral"])
    export(Options(run, "merged", tmp_path / "out", dtype="float32", quantize="nf4"))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    for name, expected in layers_by_hand(run).items():
        assert relative(packed.get_parameter(name).double(), expected) < 1e-6
    assert logits(packed).isfinite().all()
    numbers = f"{2 * 12 * 32 * 24 * 3:,}"
    assert f"Experts stay dense, {numbers} numbers" in capsys.readouterr().out
    alone = runs("qwen3_moe", **FAMILIES["qwen3_moe"])
    with pytest.raises(ValueError, match="--quantize: bitsandbytes quantises linears, and this run trained none"):
        export(Options(alone, "merged", tmp_path / "none", quantize="nf4"))
    assert not (tmp_path / "none").exists()
