"""Whoever describes an adapter or a run cannot choose what code runs: only the caller can, by option or argument."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sorsa_ds import load_adapter
from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.evaluate.models import find_evaluated_model
from sorsa_ds.export.command import export
from sorsa_ds.export.options import Options
from sorsa_ds.export.options import parse as parse_export
from sorsa_ds.model import adapter_file
from sorsa_ds.model.pretrained import find_model
from sorsa_ds.model.skeleton import read_config, skeleton
from sorsa_ds.run.source import open_finished_run
from sorsa_ds.study.analysis.history import open_history
from sorsa_ds.study.analysis.options import parse as parse_analysis
from sorsa_ds.train.options import parse as parse_train
from tests.helpers.architectures import save
from tests.helpers.finished import finished_run
from tests.helpers.own_code import CODE, leave_behind, save_with_code

REFUSAL = r"sorsa_config.json asks to run Python code .* \(loading.trust_remote_code\).*--trust_remote_code"


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """Code that transformers copies before it runs it goes where the test's other files are."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def marker(tmp_path):
    """A file that is there as soon as the model's own code has run."""
    return tmp_path / "the code has run"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a model that brings code, and with a run on it, which transformers' own code has trained."""
    root = tmp_path_factory.mktemp("original")
    finished_run(save_with_code(root / "base", root / "marker"), root / "run")
    return root


@pytest.fixture
def run(original, tmp_path, marker):
    """A copy of the run to work in; its description does not ask for the model's code."""
    base, copy = (
        shutil.copytree(original / "base", tmp_path / "base"),
        shutil.copytree(original / "run", tmp_path / "run"),
    )
    leave_behind(base, marker)
    change_description(copy, base_model=str(base))
    return copy


@pytest.fixture
def greedy(run):
    """The copy, whose description asks for the code."""
    change_description(run, loading={"trust_remote_code": True})
    return run


def change_description(run, **fields):
    """Overwrite fields of sorsa_config.json, as anybody can."""
    path = run / "adapter" / adapter_file.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def evaluated(model, **trust):
    """The model as the evaluation loads it."""
    return find_evaluated_model(str(model), **trust).load(torch.device("cpu"), None)


READERS = {
    "load_adapter": lambda run, **trust: load_adapter(run / "adapter", **trust),
    "export": lambda run, **trust: export(Options(run, "merged", run.parent / "out", **trust)),
    "evaluate a run": lambda run, **trust: evaluated(run, **trust),
    "evaluate an adapter": lambda run, **trust: evaluated(run / "adapter", **trust),
    "analyze": lambda run, **trust: open_history(run, **trust),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_description_that_asks_for_code_is_refused(greedy, marker, reader):
    with pytest.raises(ValueError, match=REFUSAL):
        READERS[reader](greedy)
    assert not marker.exists()
    assert not (greedy.parent / "out").exists()


@pytest.mark.parametrize("reader", READERS)
def test_the_caller_allows_the_code(greedy, marker, reader, monkeypatch):
    monkeypatch.setattr("sorsa_ds.study.analysis.history._check_report", lambda *_: None)
    READERS[reader](greedy, trust_remote_code=True)
    assert marker.exists()


def test_the_callers_permission_alone_runs_nothing(run, marker):
    load_adapter(run / "adapter", trust_remote_code=True)
    assert not marker.exists(), "the run was trained without that code, so it would give other numbers"


def test_an_export_takes_code_along_only_if_it_is_allowed(run, tmp_path, capsys):
    change_description(run, loading={"trust_remote_code": True})
    trusted = export(Options(run, "merged", tmp_path / "trusted", trust_remote_code=True))
    assert (trusted / CODE).exists()
    assert "auto_map" in json.loads((trusted / "config.json").read_text())
    assert "trust_remote_code=True" in (trusted / "README.md").read_text()
    change_description(run, loading={})
    capsys.readouterr()
    plain = export(Options(run, "merged", tmp_path / "plain"))
    assert not list(plain.rglob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (plain / name).read_text(), name
    assert f"own code is left out ({CODE})" in capsys.readouterr().out
    assert f"own code is left out ({CODE})" in (plain / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(plain).config.model_type == "llama"


def test_the_commands_have_the_option(tmp_path):
    for parse, words in (
        (parse_export, ["--run", "r", "--format", "merged", "--output", "o"]),
        (parse_analysis, ["--run", "r", "--output", "o"]),
    ):
        assert not parse(words).trust_remote_code
        assert parse([*words, "--trust_remote_code"]).trust_remote_code


def test_a_run_that_is_resumed_cannot_allow_code_either(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["loading"]["trust_remote_code"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"config.yaml asks to run Python .* add loading.trust_remote_code=true"):
        parse_train(["--resume", str(run)])
    for allowed in (["loading.trust_remote_code=true"], ["--config", str(run / "config.yaml")]):
        assert parse_train(["--resume", str(run), *allowed]).config.loading.trust_remote_code
    assert not parse_train(["--resume", str(run), "loading.trust_remote_code=false"]).config.loading.trust_remote_code


def test_a_run_that_is_resumed_cannot_choose_a_file_to_write(run, tmp_path):
    stored = run / "ds_config.given.json"
    chosen = {"flops_profiler": {"enabled": True, "output_file": str(tmp_path / "precious")}}
    stored.write_text(json.dumps(chosen))
    with pytest.raises(ValueError, match=r"ds_config.given.json names a file to write \(flops_profiler.output_file\)"):
        parse_train(["--resume", str(run)])
    parse_train(["--resume", str(run), "--ds_config", str(stored)])


def _with_kernel(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:f"},
        {"attn_implementation": {"": "someone/kernel"}},
        {"experts_implementation": "someone/experts"},
        {"sub": {"more": [{"_attn_implementation": "someone/kernel"}]}},
    ],
)
def test_a_configuration_that_asks_for_a_kernel_of_the_hub_is_refused(tmp_path, fields):
    folder = save("llama", tmp_path / "base")
    read_config(folder, LoadingConfig())
    _with_kernel(folder, **fields)
    with pytest.raises(ValueError, match=r"asks for the kernel .*someone/.*loading.attn_implementation"):
        read_config(folder, LoadingConfig())
    with pytest.raises(ValueError, match="asks for the kernel"):
        evaluated(folder)


def test_a_description_cannot_name_a_kernel_of_the_hub(run):
    change_description(run, loading={"attn_implementation": "someone/kernel"})
    with pytest.raises(ValueError, match="attn_implementation"):
        load_adapter(run / "adapter")


def test_a_missing_attention_package_is_not_replaced_by_code_from_the_hub(tmp_path, monkeypatch):
    folder = save("llama", tmp_path / "base")
    monkeypatch.setattr("sorsa_ds.model.skeleton.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="attn_implementation=flash_attention_2 needs the package flash-attn"):
        skeleton(folder, LoadingConfig(attn_implementation="flash_attention_2"))


def test_a_base_model_with_an_adapter_in_its_folder_is_refused(run, tmp_path):
    folder = save("llama", tmp_path / "two in one")
    shutil.copy(run / "adapter" / adapter_file.CONFIG, folder)
    with pytest.raises(ValueError, match=r"holds the description of an adapter too \(sorsa_config.json\)"):
        find_model(str(folder), LoadingConfig())


def test_shards_outside_of_the_models_folder_are_refused(tmp_path):
    folder = save("llama", tmp_path / "base")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json: '../elsewhere.safetensors' is not a file of this folder"):
        open_finished_run(finished_run(folder, tmp_path / "run"))
