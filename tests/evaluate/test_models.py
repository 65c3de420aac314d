"""Whatever holds a model can be evaluated: a run, an adapter, its exports, PEFT's format; all with the same answers."""

import json
import os
import shlex
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from sorsa_ds.evaluate import models
from sorsa_ds.evaluate.backends import placement
from sorsa_ds.export.command import Options as ExportOptions
from sorsa_ds.export.command import export
from sorsa_ds.model.adapter_file import CONFIG
from sorsa_ds.run.merge import merge_dense
from sorsa_ds.runtime import precision
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.packed_storage import Nf4
from sorsa_ds.sorsa.residual_storage import Dense
from sorsa_ds.train.options import parse
from sorsa_ds.train.setup import assemble
from tests.helpers.evaluated import asked, run
from tests.helpers.forked import run_forked
from tests.helpers.projects import ROOT, settings
from tests.helpers.worlds import run_ranks


def _train(folder, name, *changes):
    """A run in this process, as launch/train.py makes it."""
    os.environ["SORSA_CACHE"] = str(folder / "cache")
    wanted = [*settings(folder, name), f"data.path={folder / 'questions' / 'train.jsonl'}", "data.eval_size=2"]
    assemble(parse([*wanted, *changes])).train()


@pytest.fixture(scope="module")
def project(trained):
    """A model that answers, and a run that goes on training it."""
    run_ranks(1, _train, trained, "run", "train.learning_rate=5e-3")
    return trained


@pytest.fixture(scope="module")
def of_run(project):
    return run_ranks(2, run, asked(project, "of-run", model=str(project / "run")))[0]


def _export(project, kind):
    target = project / f"export-{kind}"
    run_ranks(1, export, ExportOptions(project / "run", kind, target))
    return target


def _texts(evaluation):
    return [sample["text"] for sample in evaluation[1]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["merged", "lora", "adapter"])
def test_the_exports_of_a_run_answer_as_it_does(project, of_run, kind):
    exported = run_ranks(1, run, asked(project, f"of-{kind}", model=str(_export(project, kind))))[0]
    assert _texts(exported) == _texts(of_run)
    assert exported[0]["settings"]["kind"] == {"merged": "model", "lora": "PEFT adapter", "adapter": "adapter"}[kind]


@pytest.mark.slow
def test_training_has_changed_the_answers(project, of_run):
    base = run_ranks(1, run, asked(project, "of-base"))[0]
    assert _texts(base) != _texts(of_run)


@pytest.mark.slow
def test_a_runs_results_go_into_its_folder(project):
    run_ranks(1, run_in_place, asked(project, "unused", model=str(project / "run"), output=None, limit=2))
    results = json.loads((project / "run" / "evaluation" / "gsm8k" / "results.json").read_text())
    assert results["total"] == 2
    assert results["settings"]["kind"] == "run"


def run_in_place(options):
    from sorsa_ds.evaluate.command import evaluate

    return evaluate(options)


@pytest.mark.slow
def test_a_run_over_four_bits_is_evaluated_as_it_is(project):
    run_ranks(1, _train, project, "nf4", "residual.storage=nf4")
    results, samples = run_ranks(1, run, asked(project, "of-nf4", model=str(project / "nf4")))[0]
    assert results["total"] == len(samples)
    reported = json.loads((project / "nf4" / "report.json").read_text())["eval_loss_end"]
    loss = asked(project, "nf4-loss", model=str(project / "nf4"), task="loss", data=None, max_new_tokens=None,
                 dtype="auto")  # fmt: skip
    assert run_ranks(2, run, loss)[0][0]["nats_per_token"] == pytest.approx(reported, rel=1e-5)


def _refused(folder, free):
    """What stops the loading of a run where so many bytes are free; with a quarter more it is loaded."""
    sys.argv[0] = str(ROOT / "launch" / "evaluate.py")
    found = models.find_evaluated_model(str(folder))
    placement.free_memory = lambda: free
    with pytest.raises(ValueError, match=r"must fit on one device") as told:
        found.load(torch.device("cpu"), None)
    placement.free_memory = lambda: free * 5 // 4
    found.load(torch.device("cpu"), None)
    return str(told.value)


@pytest.mark.slow
def test_a_run_that_is_larger_than_its_device_is_refused_with_the_command_that_leads_on(project):
    run_ranks(1, _train, project, "packed", "residual.storage=nf4")
    run = project / "packed"
    layers = json.loads((run / "adapter" / CONFIG).read_text())["layers"]
    packed = sum(layer["out"] * layer["in"] for layer in layers.values())
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(project / "model").parameters())
    [told] = run_ranks(1, _refused, run, 4 * (whole - packed) + packed // 2)
    words = shlex.split(told.rpartition(": ")[2])
    assert words[0] == "python"
    run_forked(project, words[1:])
    assert models.find_evaluated_model(str(run.with_name("packed-merged"))).kind == "model"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "pissa", "adalora", "dora", "full"])
def test_runs_of_other_methods_are_merged_too(project, method):
    own = {
        "adalora": ["--ds_config", "ds_configs/zero2.json", "baseline.adalora_t_init=1", "baseline.adalora_t_final=2"],
        "full": ["adapter.rank=16"],
    }  # fmt: skip
    run_ranks(1, _train, project, method, f"method={method}", *own.get(method, []))
    options = asked(project, f"{method}-loss", model=str(project / method), task="loss", data=None, max_new_tokens=None)
    assert run_ranks(1, _plain_modules, project / method) == [True]
    reported = json.loads((project / method / "report.json").read_text())["eval_loss_end"]
    assert run_ranks(1, run, options)[0][0]["nats_per_token"] == pytest.approx(reported, rel=1e-4)


def _plain_modules(folder):
    model = models.find_evaluated_model(str(folder)).load(torch.device("cpu"), torch.float32)
    return not any(hasattr(module, "base_layer") or isinstance(module, SorsaLinear) for module in model.modules())


@pytest.mark.slow
def test_what_is_no_model_is_refused_by_name(project, tmp_path):
    for what, message in (("nowhere/at/all", "there is no folder"), (str(project / "questions"), "no weights")):
        with pytest.raises(ValueError, match=message):
            models.find_evaluated_model(what)
    shutil.copytree(project / "run", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "report.json").unlink()
    with pytest.raises(ValueError, match="is unfinished"):
        models.find_evaluated_model(str(tmp_path / "unfinished"))
    with pytest.raises(ValueError, match="--base goes with"):
        models.find_evaluated_model(str(project / "model"), base="x")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="names no base model"):
        models.find_evaluated_model(str(tmp_path / "peft"))


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"peft_type": "SPELL"}, "adapters of the kind 'SPELL' (peft_type) are not read"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"peft_type": "LORA", "base_model_name_or_path": 5}, "base_model_name_or_path"),
        ({"peft_type": "LORA", "base_model_name_or_path": "a\0b"}, "NUL"),
        ({"peft_type": "LORA", "r": 10**9}, "r: Input should be less than or equal to 65536"),
        ({"peft_type": "LORA", "r": "8"}, "r: "),
        ({"peft_type": "ADALORA", "init_r": 0}, "init_r: "),
        ({"peft_type": "LORA", "rank_pattern": {"q_proj": -1}}, "rank_pattern.q_proj"),
        (["peft_type"], "is damaged: list where an object is needed"),
        (5, "is damaged: int where an object is needed"),
    ],
)
def test_a_description_that_peft_could_not_use_is_refused_by_name(tmp_path, found, named):
    (tmp_path / "adapter_config.json").write_text(json.dumps(found))
    with pytest.raises(ValueError) as caught:
        models.find_evaluated_model(str(tmp_path))
    assert named in str(caught.value)
    assert str(tmp_path / "adapter_config.json") in str(caught.value)


def test_a_description_without_end_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is damaged: more than 64 lists and objects"):
        models.find_evaluated_model(str(tmp_path))


def _layer(storage):
    torch.manual_seed(0)
    layer = SorsaLinear(24, 16, 3, bias=True, scale=0.5, storage=storage)
    with torch.no_grad():
        for name, kept in zip(storage.names, storage.pack(torch.randn(16, 24)), strict=True):
            getattr(layer, name).copy_(kept)
        for parameter in (layer.U, layer.s, layer.V, layer.bias):
            parameter.copy_(torch.randn_like(parameter))
    return torch.nn.Sequential(layer)


def _precision(name):
    return precision.resolve_precision(name, None, "cpu")


def test_merging_makes_plain_linears_that_compute_the_same_and_leaves_buffers_alone():
    model = _layer(Dense(torch.float32))
    model.register_buffer("frequencies", torch.tensor([1.0001]))
    x = torch.randn(5, 24)
    expected = model(x)
    W = (model[0].residual + 0.5 * (model[0].U * model[0].s) @ model[0].V.t()).detach()
    merged = merge_dense(model, "sorsa", _precision("fp32"), torch.float32)
    assert type(merged[0]) is torch.nn.Linear
    torch.testing.assert_close(merged(x), expected)
    narrow = _layer(Dense(torch.float32))
    narrow.register_buffer("frequencies", torch.tensor([1.0001]))
    merge_dense(narrow, "sorsa", _precision("fp32"), torch.bfloat16)
    torch.testing.assert_close(narrow[0].weight.float(), W, rtol=2**-8, atol=1e-6)
    assert narrow[0].bias.dtype == torch.bfloat16
    assert narrow.frequencies.dtype == torch.float32


def test_of_a_mixed_run_what_training_computed_with_is_merged():
    layer = _layer(Dense(torch.bfloat16))[0]
    left, right = ((0.5 * layer.U * layer.s).bfloat16(), layer.V.bfloat16())
    W = (layer.residual.float() + left.float() @ right.float().t()).detach()
    model = merge_dense(_layer(Dense(torch.bfloat16)), "sorsa", _precision("mixed"), torch.float32)
    torch.testing.assert_close(model[0].weight, W, rtol=1e-6, atol=1e-6)


def test_over_a_packed_residual_the_factors_stay_apart():
    model = merge_dense(_layer(Nf4(64)), "sorsa", _precision("fp32"), torch.bfloat16)
    assert type(model[0]) is SorsaLinear
    assert model[0].residual.dtype == torch.uint8
    assert model[0].U.dtype == torch.bfloat16
