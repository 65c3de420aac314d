"""What decides a model's numbers besides its weights is kept, compared, and named where it differs."""

import json
import shutil

import pytest
import torch
from transformers import Mamba2Config, MixtralConfig

from sorsa_ds import load_adapter
from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.evaluate.models import find_evaluated_model
from sorsa_ds.export.command import export
from sorsa_ds.export.options import Options
from sorsa_ds.model.adapter_file import CONFIG
from sorsa_ds.model.numerics import check_numerics, numerics_of
from sorsa_ds.study.analysis.history import open_history
from tests.helpers.architectures import CONFIGS, save
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.finished import finished_run

LOADING = LoadingConfig()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model with a tokenizer."""
    folder = save("llama", tmp_path_factory.mktemp("original") / "base")
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(original, tmp_path):
    """A copy to change."""
    return shutil.copytree(original, tmp_path / "base")


@pytest.fixture(scope="module")
def kept(original):
    """What is kept of it, after a journey through JSON."""
    return json.loads(json.dumps(numerics_of(original, LOADING), allow_nan=False))


def set_fields(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def difference(kept, base) -> str:
    """What is told of a changed folder; nothing is an empty text."""
    try:
        check_numerics(kept, base, LOADING, print)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rms_norm_eps": 0.5}, "config.rms_norm_eps was 1e-06 and is 0.5 now"),
        ({"rope_theta": 5.0, "rope_parameters": None}, "rope_parameters.rope_theta was 10000.0 and is 5.0 now"),
        ({"hidden_act": "gelu"}, "config.hidden_act was 'silu' and is 'gelu' now"),
        ({"attention_dropout": 0.5}, "config.attention_dropout was 0.0 and is 0.5 now"),
        ({"rms_norm_eps": 0.5, "max_position_embeddings": 4}, r"rms_norm_eps was .*; config.max_position|position.*; "),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "config.model_type was 'llama' and is"),
    ],
)
def test_each_changed_field_is_named_with_both_values(kept, base, fields, told):
    assert difference(kept, base) == ""
    set_fields(base / "config.json", **fields)
    with pytest.raises(ValueError, match=told):
        check_numerics(kept, base, LOADING, print)


def test_fields_that_move_no_number_may_change(kept, base):
    set_fields(
        base / "config.json", transformers_version="9.9", dtype="bfloat16", _name_or_path="elsewhere", use_cache=False,
        architectures=["Other"], pad_token_id=3, initializer_range=1.0, auto_map={"AutoConfig": "own.Own"},
    )  # fmt: skip
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert difference(kept, base) == ""


def test_a_default_that_is_written_out_is_no_difference(kept, base):
    config = json.loads((base / "config.json").read_text())
    del config["rms_norm_eps"]  # 1e-6 is its default
    (base / "config.json").write_text(json.dumps(config))
    assert difference(kept, base) == ""


def _tokenizer(base, **changes):
    path = base / "tokenizer.json"
    content = json.loads(path.read_text())
    for change in changes.values():
        change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t["model"]["merges"].reverse(), "tokenizer.merges was"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "tokenizer.cutting was"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "tokenizer.cutting was"),
    ],
)
def test_a_tokenizer_that_cuts_otherwise_is_named(kept, base, change, told):
    _tokenizer(base, change=change)
    with pytest.raises(ValueError, match=told):
        check_numerics(kept, base, LOADING, print)


def test_other_parts_of_the_tokenizer_are_named(kept, base):
    (base / "chat_template.jinja").write_text("another")
    assert "tokenizer.chat_template was" in difference(kept, base)
    set_fields(base / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert "special_tokens.eos_token was '<|im_end|>' and is '<|endoftext|>' now" in difference(kept, base)


def test_a_tokenizer_that_is_stored_otherwise_is_the_same(kept, base):
    chat_tokenizer().save_pretrained(base)
    _tokenizer(base, change=lambda t: t.update(truncation=None, padding=None))
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # as older versions store them
    (base / "tokenizer.json").write_text(json.dumps(content, indent=3))
    assert difference(kept, base) == ""


def test_without_a_tokenizer_the_rest_is_compared(kept, base, capsys):
    for file in base.glob("tokenizer*"):
        file.unlink()
    assert difference(kept, base) == ""
    assert "The tokenizer of training could not be compared: model:" in capsys.readouterr().out
    set_fields(base / "config.json", rms_norm_eps=0.5)
    assert "rms_norm_eps" in difference(kept, base)


def test_code_of_the_models_own_counts_where_it_is_allowed(base):
    trusting = LoadingConfig(trust_remote_code=True)
    (base / "own.py").write_text("A = 1\n")
    kept = numerics_of(base, trusting)
    (base / "own.py").write_text("A = 2\n")
    with pytest.raises(ValueError, match=r"code\.own\.py was '"):
        check_numerics(kept, base, trusting, print)
    check_numerics(numerics_of(base, LOADING), base, LOADING, print)


@pytest.mark.parametrize("config", [*CONFIGS.values(), Mamba2Config(), MixtralConfig()], ids=lambda c: type(c).__name__)
def test_every_architecture_is_equal_to_itself(tmp_path, config):
    config.save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    kept = json.loads(json.dumps(numerics_of(tmp_path, LOADING), allow_nan=False))
    assert difference(kept, tmp_path) == ""
    assert len(kept["config"]) > 8


@pytest.mark.parametrize("nonsense", [{"config": 5}, {"config": {"hidden_size": "much"}}, {"tokenizer": {}}, [1]])
def test_nonsense_is_refused(base, nonsense):
    assert "was written down of" in difference(nonsense, base)


@pytest.fixture(scope="module")
def described(original, tmp_path_factory):
    """A finished run that has kept them."""
    return finished_run(original, tmp_path_factory.mktemp("described") / "run", numerics=numerics_of(original, LOADING))


READERS = {
    "load_adapter": lambda run, base: load_adapter(run / "adapter", base=base),
    "export": lambda run, base: export(Options(run, "lora", run.parent / "out", base=base)),
    "evaluate": lambda run, base: find_evaluated_model(str(run), base=base),
    "analyze": lambda run, base: open_history(run, base=base),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_another_configuration(described, base, tmp_path, monkeypatch, capsys, reader):
    monkeypatch.setattr("sorsa_ds.study.analysis.history._check_report", lambda *_: None)
    run = shutil.copytree(described, tmp_path / "run")
    READERS[reader](run, str(base))
    assert "was not written down" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    set_fields(base / "config.json", rms_norm_eps=0.5)
    with pytest.raises(ValueError, match=r"config.rms_norm_eps was 1e-06 and is 0.5 now"):
        READERS[reader](run, str(base))
    assert not (tmp_path / "out").exists()


def test_an_exported_adapter_keeps_them(described, tmp_path, base):
    output = export(Options(described, "adapter", tmp_path / "out"))
    set_fields(base / "config.json", rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    with pytest.raises(ValueError, match="rope_theta was 10000.0 and is 5.0 now"):
        load_adapter(output, base=str(base))


def test_an_older_adapter_loads_with_a_note(described, tmp_path, capsys):
    run = shutil.copytree(described, tmp_path / "run")
    path = run / "adapter" / CONFIG
    content = json.loads(path.read_text())
    del content["numerics"]
    path.write_text(json.dumps(content))
    assert isinstance(load_adapter(run / "adapter"), torch.nn.Module)
    assert "in training was not written down; whether they have changed is not checked" in capsys.readouterr().out
