"""An adapter in PEFT's format: what its description may ask for, and whether it belongs to its base model at all."""

import dataclasses
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sorsa_ds.evaluate import models, peft_adapter
from tests.helpers.architectures import save

CPU = torch.device("cpu")
IDS = torch.arange(1, 13)[None]
WORDS = frozenset((
    "target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern",
    "lambda_pattern", "trainable_token_indices", "target_parameters", "bias", "block_size_pattern",
    "n_frequency_pattern", "feedforward_modules", "target_svd_config", "act_fn", "variant", "init_weights",
    "svd", "wavelet_family", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "monteclora_config", "runtime_config", "use_bdlora", "arrow_config", "kasa_config", "megatron_core", "directions",
))  # fmt: skip
"""Fields of PEFT's descriptions that hold words or objects, and that choose neither code nor files nor other models
when an adapter is loaded (megatron_core does nothing without megatron_config; only a new adapter reads directions)."""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A base model, and a LoRA on it that does something."""
    root = tmp_path_factory.mktemp("peft")
    base = AutoModelForCausalLM.from_pretrained(save("llama", root / "base"))
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(root / "adapter", save_embedding_layers=False)
    return root


@pytest.fixture
def adapter(original, tmp_path):
    """A copy of the adapter to work in."""
    folder = shutil.copytree(original / "adapter", tmp_path / "adapter")
    describe(folder, base_model_name_or_path=str(original / "base"))
    return folder


def describe(folder, **fields):
    path = folder / peft_adapter.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder, change):
    """Change the adapter's tensors, which `change` gets as a dictionary and returns."""
    path = folder / peft_adapter.WEIGHTS
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def load(folder, **options):
    return models.find_evaluated_model(str(folder), **options).load(CPU, torch.float32)


def test_an_adapter_that_fits_is_merged_into_its_base_model(adapter, original):
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(original / "base"), adapter).eval()
    with torch.no_grad():
        ours, wanted, base = load(adapter)(IDS).logits, theirs(IDS).logits, theirs.disable_adapter
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
        with base():
            assert (theirs(IDS).logits - wanted).abs().max() > 1e-3, "the adapter changes nothing"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: {f"other.{name}": x for name, x in t.items()}, "of its 8 tensors 8 have no place in the base model"),
        (lambda t: {n.replace("layers.1", "layers.7"): x for n, x in t.items()}, r"4 have no place .*layers.7"),
        (lambda t: {n: x for n, x in t.items() if "layers.1" not in n}, r"has 4 places .* no tensor, first .*layers.1"),
        (lambda t: {n: x[:, :2].contiguous() if "lora_B" in n else x for n, x in t.items()}, "size mismatch"),
        (lambda t: {}, "holds no tensor"),
        (lambda t: {n: x * float("nan") for n, x in t.items()}, "holds NaN or Inf"),
        (lambda t: {n: x.to(torch.int8) for n, x in t.items()}, "is stored as int8"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(adapter, change, told):
    rewrite(adapter, change)
    with pytest.raises(ValueError, match=told):
        load(adapter)


def test_an_adapter_on_another_base_model_is_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match="is no adapter for this base model"):
        load(adapter, base=str(save("gpt2", tmp_path / "gpt2")))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"peft_type": "XLORA", "adapters": {"a": "someone/adapter"}}, r"of the kind 'XLORA' \(peft_type\)"),
        ({"peft_type": "SHADOW", "shadow_model": "someone/model"}, "of the kind 'SHADOW'"),
        ({"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}}, "'PROMPT_TUNING'"),
        ({"peft_type": ["LORA"]}, r"of the kind \['LORA'\]"),
        ({"megatron_config": {"x": 1}, "megatron_core": "antigravity"}, r"sets megatron_config, .* imports a module"),
        ({"base_model_name_or_path": 5}, r"\(base_model_name_or_path: Input should be a valid string\)"),
        ({"base_model_name_or_path": None}, "names no base model"),
    ],
)
def test_a_description_cannot_choose_code_or_other_models(adapter, fields, told):
    describe(adapter, **fields)
    with pytest.raises(ValueError, match=told):
        models.find_evaluated_model(str(adapter))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"lora_alpha": 1e308}, r"lora_alpha is 1e\+308; numbers up to 1,000,000,000 are read"),
        ({"alpha_pattern": {"q_proj": -1e300}}, r"alpha_pattern.q_proj is -1e\+300"),
        ({"peft_type": "UNILORA", "theta_d_length": 10**400}, r"theta_d_length is 1000"),
        ({"layer_replication": [[0, 2]] * 9}, "sets layer_replication, .* as many layers"),
    ],
)
def test_numbers_that_no_adapter_has_are_refused(adapter, fields, told):
    describe(adapter, **fields)
    with pytest.raises(ValueError, match=told):
        load(adapter)


def test_an_adapter_whose_weights_grow_out_of_all_numbers_is_refused(adapter):
    rewrite(adapter, lambda tensors: {name: x * 1e34 for name, x in tensors.items()})
    with pytest.raises(ValueError, match=r"q_proj.weight is not finite: its scale"):
        load(adapter)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"((\w+\.?)+)+!"},
        {"rank_pattern": {r"((\w+\.?)+)+!": 4}},
        {"exclude_modules": r"((\w+\.?)+)+!"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_pattern_that_takes_forever_is_refused_after_some_time(adapter, monkeypatch, fields):
    monkeypatch.setattr(peft_adapter, "_SECONDS", 1.0)
    describe(adapter, **fields)
    with pytest.raises(ValueError, match="patterns with the names of the model's modules was stopped after 1 s"):
        load(adapter)


def test_patterns_are_allowed_and_wrong_ones_named(adapter):
    describe(adapter, target_modules=r".*layers\.\d+\.(self_attn\.q_proj|mlp\.up_proj)")
    load(adapter)
    describe(adapter, target_modules="(q_proj")
    with pytest.raises(ValueError, match=r"'\(q_proj' is no regular expression: missing \)"):
        load(adapter)


def test_every_kind_and_field_of_peft_is_known_here():
    """A new version of PEFT cannot bring one unseen."""
    import sorsa_ds.peft  # noqa: F401  # the method of ours

    mergeable = {kind.value for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if hasattr(tuner, "merge_and_unload")}
    assert mergeable - {"XLORA", "SHADOW"} == peft_adapter.KINDS
    inherited = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind.value in peft_adapter.KINDS:
            wordy = {
                field.name for field in dataclasses.fields(config)
                if any(word in str(field.type) for word in ("str", "dict", "Config"))
            }  # fmt: skip
            assert wordy - WORDS - inherited - peft_adapter.REFUSED_FIELDS.keys() == set(), kind


def test_what_the_hub_gives_may_be_an_adapter(adapter, monkeypatch):
    monkeypatch.setattr(models, "find_folder", lambda name, loading: adapter)
    assert models.find_evaluated_model("someone/adapter").kind == "PEFT adapter"
    describe(adapter, megatron_config={"x": 1})
    with pytest.raises(ValueError, match="sets megatron_config"):
        models.find_evaluated_model("someone/adapter")


@pytest.mark.parametrize("content", ["[]", '"peft_type"', "{", "5"])
def test_a_description_that_is_no_object_is_named(adapter, content):
    (adapter / peft_adapter.CONFIG).write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged"):
        models.find_evaluated_model(str(adapter))
