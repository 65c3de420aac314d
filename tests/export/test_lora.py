"""A finished run as a LoRA over the untouched base, and as an adapter: checked by PEFT and plain torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from sorsa_ds import load_adapter
from sorsa_ds.export.command import Options, export
from sorsa_ds.model import adapter_file
from sorsa_ds.run.peft_files.notes import served_by_vllm
from tests.helpers.distances import relative
from tests.helpers.exported import change_description, layers_by_hand, logits, plainly
from tests.helpers.finished import base_of

ROOT = Path(__file__).parents[2]


ARCHITECTURES = ["llama", "llama-tied-bias", "gpt2", "qwen2", "phi3", "rwkv"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_on_the_untouched_base_is_the_trained_model(runs, tmp_path, name):
    pattern = {} if name in ("gpt2", "rwkv") else {"*.0.*": 3}
    run = runs(name, rank_pattern=pattern, alpha=6.0)
    output = export(Options(run, "lora", tmp_path / "out"))
    config = json.loads((output / "adapter_config.json").read_text())
    described = adapter_file.read_description(run / "adapter")
    assert sorted(config["target_modules"]) == sorted(described.layers)
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["fan_in_fan_out"] is (name == "gpt2")
    assert config["base_model_name_or_path"] == str(base_of(run))
    theirs = logits(load_adapter(run / "adapter"))
    model = PeftModel.from_pretrained(plainly(base_of(run)), output)
    adapted = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(described.layers)
    ranks = {n: model.get_submodule(f"base_model.model.{n}").r["default"] for n in adapted}
    assert ranks == {n: 2 * layer["rank"] for n, layer in described.layers.items()}
    assert relative(logits(model), theirs) < 1e-5
    assert relative(logits(model.merge_and_unload()), theirs) < 1e-5


def test_a_lora_is_cut_as_well_as_it_can_be(runs, tmp_path):
    run = runs("llama", rank=6)
    output = export(Options(run, "lora", tmp_path / "out", rank=3))
    told = json.loads((output / "truncation.json").read_text())
    assert json.loads((output / "adapter_config.json").read_text())["r"] == told["rank"] == 3
    tensors, base = load_file(output / "adapter_model.safetensors"), plainly(base_of(run))
    for name, whole in layers_by_hand(run).items():
        dW = whole - base.get_submodule(name).weight.double()
        A, B = (tensors[f"base_model.model.{name}.lora_{leaf}.weight"].double() for leaf in "AB")
        assert A.shape[0] == B.shape[1] == 3
        d = torch.linalg.svdvals(dW)
        optimum = (d[3:].norm() / d.norm()).item()
        assert 0.05 < optimum < 1
        assert told["layers"][name] == pytest.approx(optimum, rel=1e-3)
        assert relative(B @ A, dW) == pytest.approx(optimum, rel=1e-3)
    assert told["worst"] == max(told["layers"].values())
    assert told["mean"] == pytest.approx(sum(told["layers"].values()) / len(told["layers"]))
    PeftModel.from_pretrained(base, output)


def test_an_exact_lora_bears_bf16(runs, tmp_path):
    """What the plain form [U s, -U0 s0] [V, V0]^T would not: its two parts nearly cancel."""
    run = runs("llama", size=0.01)
    tensors = load_file(export(Options(run, "lora", tmp_path / "out")) / "adapter_model.safetensors")
    base = plainly(base_of(run))
    for name, whole in layers_by_hand(run).items():
        dW = whole - base.get_submodule(name).weight.double()
        A, B = (tensors[f"base_model.model.{name}.lora_{leaf}.weight"] for leaf in "AB")
        assert relative(B.double() @ A.double(), dW) < 1e-5, name
        assert relative(B.bfloat16().double() @ A.bfloat16().double(), dW) < 0.01, name


def test_vllm_is_told_a_rank_that_it_takes():
    assert "--max-lora-rank 16 " in served_by_vllm(10)
    assert "--max-lora-rank 320 " in served_by_vllm(257)
    assert "cut it with launch/export.py --format lora --rank 512" in served_by_vllm(513)


@pytest.mark.slow
def test_adapter_loads_without_deepspeed(runs, tmp_path):
    run = runs("qwen2")
    output = export(Options(run, "adapter", tmp_path / "out"))
    for name in (adapter_file.INITIAL, adapter_file.TRAINED, adapter_file.CONFIG):
        assert (output / name).read_bytes() == (run / "adapter" / name).read_bytes()
    program = (
        "import sys, torch\nfrom sorsa_ds import load_adapter\n"
        f"model = load_adapter({str(output)!r})\n"
        "assert 'deepspeed' not in sys.modules\n"
        "assert {n.rpartition('.')[2] for n, p in model.named_parameters() if p.requires_grad} == {'U', 's', 'V'}\n"
        f"torch.save(model.eval()(torch.arange(1, 25).view(2, 12) % 64).logits.detach(), {str(tmp_path / 'l')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    assert torch.equal(torch.load(tmp_path / "l"), logits(load_adapter(run / "adapter")))


def test_a_base_model_that_has_moved(runs, tmp_path):
    run = runs("llama")
    moved = shutil.copytree(base_of(run), tmp_path / "moved")
    gone = shutil.copytree(run, tmp_path / "run")
    change_description(gone, base_model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no folder.*nowhere.*--base"):
        export(Options(gone, "adapter", tmp_path / "out"))
    output = export(Options(gone, "adapter", tmp_path / "out", base=str(moved)))
    assert torch.equal(logits(load_adapter(output)), logits(load_adapter(run / "adapter")))
