"""A run's folder adapter/ is one that PEFT loads as it is, beside what the run goes on from.

That real runs of every method, and with modules trained whole, end with such a folder is tested where they are made:
tests/methods/test_methods.py, tests/run/test_train_whole.py.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sorsa_ds import load_adapter
from sorsa_ds.evaluate.models import find_evaluated_model
from sorsa_ds.export.command import Options, export
from sorsa_ds.run.finished import RunState
from sorsa_ds.run.peft_files import beside
from sorsa_ds.run.peft_files.beside import add_peft_files
from tests.helpers.architectures import save
from tests.helpers.distances import relative
from tests.helpers.finished import base_of, finished_run, finished_whole_run

CPU = torch.device("cpu")
INPUT = torch.arange(1, 25).view(2, 12) % 64
OWN = {"sorsa_config.json", "trained_factors.safetensors", "initial_factors.safetensors"}
PEFTS = {"adapter_config.json", "adapter_model.safetensors"}


def add(run, **output):
    """Call `add_peft_files` as training does at its end."""
    config = RunState(run).settings()
    add_peft_files(run, replace(config, output=replace(config.output, **output)), CPU)
    return {path.name for path in (run / "adapter").iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Finished runs with PEFT's files, by architecture and storage."""
    root, runs = tmp_path_factory.mktemp("runs"), {}

    def run(name, **settings):
        key = json.dumps([name, settings])
        if key not in runs:
            if not (base := root / name).exists():
                save(name, base)
            runs[key] = finished_run(base, root / f"run-{len(runs)}", **settings)
            assert add(runs[key]) == OWN | PEFTS
        return runs[key]

    return run


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(INPUT).logits.float()


def plainly(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias", "gpt2", "phi3"])
def test_peft_loads_the_folder_of_a_run_on_its_base_model(made, name):
    run = made(name, rank_pattern={} if name == "gpt2" else {"*.0.*": 3}, alpha=6.0)
    trained, base = logits(load_adapter(run / "adapter")), plainly(base_of(run))
    before = logits(base)
    assert relative(before, trained) > 1e-3
    adapted = PeftModel.from_pretrained(base, run / "adapter")
    assert relative(logits(adapted), trained) < 1e-5
    assert relative(logits(adapted.merge_and_unload()), trained) < 1e-5


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_over_a_quantised_residual_it_is_the_change_that_training_made(made, tmp_path, capsys, storage):
    """Exact on the model from which training began; on the pre-trained model it is the same change of each weight."""
    run = made("llama", storage=storage)
    trained = logits(load_adapter(run / "adapter"))
    export(Options(run, "base", tmp_path / "base", dtype="float32"))
    export(Options(run, "merged", tmp_path / "merged", dtype="float32"))
    began, merged = plainly(tmp_path / "base"), plainly(tmp_path / "merged")
    assert relative(logits(began), trained) > 1e-3
    change = {name: merged.get_parameter(name) - began.get_parameter(name) for name, _ in began.named_parameters()}
    assert relative(logits(PeftModel.from_pretrained(began, run / "adapter")), trained) < 1e-5
    plain = plainly(base_of(run))
    adapted = PeftModel.from_pretrained(plainly(base_of(run)), run / "adapter").merge_and_unload()
    for name, weight in adapted.named_parameters():
        moved = weight - plain.get_parameter(name)
        assert (moved - change[name]).norm() < 1e-4 * max(change[name].norm().item(), 1e-3), name
    add(run)
    assert "It is exact on the model that `--format base` writes" in capsys.readouterr().out


def test_bf16_weights_are_said(made, capsys):
    run = made("llama", precision="mixed")
    add(run)
    printed = capsys.readouterr().out
    assert "without that rounding; `--format merged` has it" in printed
    assert "vLLM serves it with --enable-lora --max-lora-rank 8 " in printed


def test_this_program_goes_on_from_its_own_files(made):
    """PEFT's files beside them change nothing for it."""
    run = made("llama")
    assert find_evaluated_model(str(run / "adapter")).kind == "adapter"
    (run / "adapter" / "adapter_config.json").rename(run / "aside.json")
    alone = logits(load_adapter(run / "adapter"))
    (run / "aside.json").rename(run / "adapter" / "adapter_config.json")
    assert torch.equal(logits(load_adapter(run / "adapter")), alone)


def test_the_exported_lora_is_the_same(made, tmp_path):
    run = made("llama")
    export(Options(run, "lora", tmp_path / "lora"))
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", tmp_path / "lora"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    description = "adapter_config.json"
    assert (run / "adapter" / description).read_text() == (tmp_path / "lora" / description).read_text()


def test_without_them_none_of_an_earlier_end_stay(made, tmp_path):
    run = shutil.copytree(made("llama"), tmp_path / "run")
    assert add(run, peft_adapter=False) == OWN


@pytest.mark.parametrize("method", ["full", "partial"])
def test_whole_weights_are_refused_by_name(tmp_path, capsys, method):
    save("llama", tmp_path / "base")
    run, _ = finished_whole_run(tmp_path / "base", tmp_path / "run", method)
    assert not add(run) & PEFTS
    told = capsys.readouterr().err
    assert "gets no files in PEFT's format: whole weights were trained, which no adapter holds" in told
    assert "--format merged" in told


def test_what_peft_cannot_hold_is_left_out_and_the_run_goes_on(made, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(made("llama"), tmp_path / "run")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(beside, "write_lora", full)
    assert add(run) == OWN
    assert "gets no files in PEFT's format: [Errno 28] No space left" in capsys.readouterr().err
