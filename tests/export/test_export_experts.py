"""Merged models of mixtures of experts: the trained model, in the layout of the base model's own files."""

import json

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sorsa_ds.export.command import Options, export
from sorsa_ds.methods.families.whole_weights import Full, WholeWeights
from sorsa_ds.model.targets import Target
from sorsa_ds.model.weight_conversion import Conversion
from sorsa_ds.run.reload import load_adapter
from tests.helpers.expert_models import save_experts
from tests.helpers.finished import finished_run, finished_whole_run

INPUT = torch.arange(1, 25).view(2, 12) % 64


def logits(model) -> torch.Tensor:
    """The logits of a model on a fixed input."""
    with torch.no_grad():
        return model.eval()(INPUT).logits.float()


def headers(folder) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Tensor name -> (dtype, shape) of all files of a folder."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: (tensor.dtype, tensor.shape) for file in files for name, tensor in file.items()}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "jamba", "phimoe", "hrm_text"])
def test_a_fully_trained_mixture_of_experts_is_written_as_its_base_is_stored(tmp_path, name):
    base = save_experts(name, tmp_path / "base")
    run, trained = finished_whole_run(base, tmp_path / "run", "full")
    export(Options(run, "merged", tmp_path / "out"))
    assert headers(tmp_path / "out") == headers(base)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert not any(torch.equal(before[one], after[one]) for one in before)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(model.get_parameter(one), weight) for one, weight in trained.named_parameters())
    assert torch.equal(logits(model), logits(trained))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_were_not_trained_are_copied(tmp_path, name):
    base = save_experts(name, tmp_path / "base")
    run, trained = finished_whole_run(base, tmp_path / "run", "partial", targets=["q_proj", "o_proj"])
    export(Options(run, "merged", tmp_path / "out"))
    assert headers(tmp_path / "out") == headers(base)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for one in before:
        assert torch.equal(before[one], after[one]) != ("q_proj" in one or "o_proj" in one), one
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(trained))


def test_a_linear_that_is_stored_fused_with_others_is_written_into_its_place(tmp_path):
    base = save_experts("hrm_text", tmp_path / "base")
    run, trained = finished_whole_run(base, tmp_path / "run", "partial", targets=["q_proj"])
    export(Options(run, "merged", tmp_path / "out"))
    assert headers(tmp_path / "out") == headers(base)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for one in before:  # its rows come second, after the gate's
        parts = [torch.equal(*pair) for pair in zip(before[one].split(32), after[one].split(32), strict=True)]
        assert parts == ([True, False, True, True] if "gqkv" in one else [True] * len(parts)), one
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(trained))


def test_a_bf16_checkpoint_trained_in_fp32_is_rounded_once(tmp_path):
    base = save_experts("mixtral", tmp_path / "base", torch.bfloat16)
    run, trained = finished_whole_run(base, tmp_path / "run", "full")
    export(Options(run, "merged", tmp_path / "out"))
    assert headers(tmp_path / "out") == headers(base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert all(torch.equal(model.get_parameter(n), p.bfloat16()) for n, p in trained.named_parameters())
    export(Options(run, "merged", tmp_path / "wide", dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto")
    assert all(torch.equal(model.get_parameter(n), p) for n, p in trained.named_parameters())


def test_every_group_is_made_once_also_where_files_divide_it(tmp_path, monkeypatch):
    base = save_experts("mixtral", tmp_path / "base")
    run, trained = finished_whole_run(base, tmp_path / "run", "full")
    made, own = [], Conversion.revert
    monkeypatch.setattr(Conversion, "revert", lambda self, tensors: (made.append(self.first), own(self, tensors))[1])
    export(Options(run, "merged", tmp_path / "out", max_shard_size="30kB"))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 8
    assert len(made) == len(set(made)) == 4
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(len({file for one, file in index.items() if f"layers.{layer}.block_sparse_moe.experts" in one}) > 2
               for layer in (0, 1))  # fmt: skip
    assert headers(tmp_path / "out") == headers(base)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(trained))


def test_an_expert_that_is_too_large_for_the_dtype_is_named(tmp_path, monkeypatch):
    base = save_experts("mixtral", tmp_path / "base")
    run, _ = finished_whole_run(base, tmp_path / "run", "full")
    own = WholeWeights.merged_weight
    monkeypatch.setattr(WholeWeights, "merged_weight", lambda *a, **k: 1e6 * own(*a, **k))
    with pytest.raises(ValueError, match="holds numbers too large for torch.float16: choose another --dtype"):
        export(Options(run, "merged", tmp_path / "out", dtype="float16"))
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_trained_no_linear_is_not_quantised(tmp_path, monkeypatch):
    run, _ = finished_whole_run(save_experts("mixtral", tmp_path / "base"), tmp_path / "run", "full")
    experts = [Target("model.layers.0.mlp.experts.down_proj", 32, 24, 4, False, False)]
    monkeypatch.setattr(Full, "trained_linears", lambda *_: experts)
    with pytest.raises(ValueError, match="--quantize: bitsandbytes quantises linears, and this run trained none"):
        export(Options(run, "merged", tmp_path / "out", quantize="nf4"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_other_exports_of_a_mixture_of_experts(tmp_path, name):
    """SORSA on the attention's linears, over nf4: merged, as training began, and quantised anew."""
    base = save_experts(name, tmp_path / "base")
    run = finished_run(base, tmp_path / "run", storage="nf4", targets=["q_proj", "o_proj"])
    trained = logits(load_adapter(run / "adapter"))
    export(Options(run, "merged", tmp_path / "merged"))
    assert headers(tmp_path / "merged") == headers(base)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (merged - trained).norm() < 1e-5 * trained.norm()
    export(Options(run, "base", tmp_path / "began"))
    assert headers(tmp_path / "began") == headers(base)
    export(Options(run, "merged", tmp_path / "4bit", quantize="nf4"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")
    errors = json.loads((tmp_path / "4bit" / "quantisation.json").read_text())["layers"]
    assert len(errors) == 4
    weights = load_file(base / "model.safetensors")
    share = sum(weights[f"{one}.weight"].numel() for one in errors) / sum(t.numel() for t in weights.values())
    assert (
        f"4 linears, {share:.1%} of all weights, are quantised anew (nf4)" in (tmp_path / "4bit/README.md").read_text()
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for one, error in errors.items():
        weight = plain.get_parameter(f"{one}.weight")
        packed = bitsandbytes.functional.quantize_4bit(weight.data, blocksize=64, quant_type="nf4")
        lost = weight.data - bitsandbytes.functional.dequantize_4bit(*packed)
        assert error == pytest.approx(float(lost.norm() / weight.norm()), rel=1e-3)
        weight.data -= lost
    assert (logits(model) - logits(plain)).norm() < 0.02 * merged.norm()  # bitsandbytes multiplies in bf16
