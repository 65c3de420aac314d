"""SORSA through PEFT's own programs: what it computes, saves, merges, and refuses."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import bitsandbytes
import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, convert_to_lora, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Phi3Config

from sorsa_ds.model.input_directions import Directions, Origin, probe_of, write_directions
from sorsa_ds.peft import SorsaConfig, SorsaModel, peft_type
from sorsa_ds.sorsa.decompose import decompose
from tests.helpers.architectures import CONFIGS, save
from tests.helpers.peft_models import INPUT, adapted, layers_of, load, logits, moved

KINDS = ["llama-tied-bias", "phi3", "gpt2"]
"""With biases, with fused linears, and with weights that are stored as (in, out)."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random models on disk, by kind."""
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_model_with_the_leading_triplets(folders, kind):
    before = logits(load(folders[kind]))
    model = adapted(folders[kind], move=0)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    base = load(folders[kind])
    for name, layer in layers_of(model).items():
        weight = base.get_parameter(f"{name.removeprefix('base_model.model.')}.weight")
        U, s, Vt = torch.linalg.svd(weight.T if kind == "gpt2" else weight, full_matrices=False)
        ours = layer.sorsa_factors["default"]
        torch.testing.assert_close(ours.s.detach(), s[:4], rtol=1e-4, atol=1e-5)
        product = (ours.U * ours.s) @ ours.V.T
        torch.testing.assert_close(product.detach(), (U[:, :4] * s[:4]) @ Vt[:4], rtol=1e-3, atol=1e-3)


def test_a_layers_decomposition_is_the_trainers(folders):
    """The same function, seeded by the same name, bit for bit."""
    model = adapted(folders["phi3"], move=0)
    for name, layer in layers_of(model).items():
        name = name.removeprefix("base_model.model.")
        found = decompose(layer.get_base_layer().weight.data, 4, name, "randomized", 1e-2, 16)
        for ours, theirs in zip(layer.sorsa_initial["default"].parameters(), found.tensors(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_it_is_the_base_model_bit_for_bit(folders, kind):
    before, model = logits(load(folders[kind])), adapted(folders[kind])
    changed = logits(model)
    assert (changed - before).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), changed)
    assert torch.equal(logits(model.unload()), before)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_a_plain_model_that_computes_the_same(folders, kind):
    model = adapted(folders[kind], sorsa_alpha=6.0)
    changed = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-4)
    plain = model.merge_and_unload(safe_merge=True)
    assert not layers_of(plain)
    torch.testing.assert_close(logits(plain), changed, rtol=1e-4, atol=1e-4)


def test_a_broken_adapter_is_not_merged_safely(folders):
    model = adapted(folders["phi3"])
    next(iter(layers_of(model).values())).sorsa_factors["default"].s.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_saved_adapter_is_read_without_decomposing_anything(folders, tmp_path, monkeypatch, low_memory):
    model = adapted(folders["gpt2"], sorsa_alpha=6.0, rank_pattern={"c_proj": 3})
    changed = logits(model)
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["peft_type"] == "SORSA"
    monkeypatch.setattr("sorsa_ds.peft.layer.decompose", None)
    again = PeftModel.from_pretrained(load(folders["gpt2"]), tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(again), changed)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    for layer in layers_of(again).values():
        assert all(parameter.dtype == torch.float32 for parameter in layer.sorsa_factors.parameters())


def test_the_file_has_the_initial_factors_so_another_decomposition_does_not_matter(folders, tmp_path):
    """An adapter whose initial factors are not the singular triplets, as after rounds of quantisation."""
    model = adapted(folders["phi3"])
    for layer in layers_of(model).values():
        layer.sorsa_initial["default"].U.data.mul_(0.9)
    changed = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(folders["phi3"]), tmp_path)), changed)


def test_a_file_without_initial_factors_is_refused(folders, tmp_path):
    adapted(folders["phi3"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "sorsa_initial" not in name}, file)
    model = PeftModel.from_pretrained(load(folders["phi3"]), tmp_path)
    with pytest.raises(ValueError, match=r"'default' were never loaded.*sorsa_initial"):
        logits(model)


def test_a_configuration_that_was_read_begins_a_new_adapter(folders, tmp_path):
    """As TRL does it for its reference adapter: the configuration of the loaded one makes another one."""
    adapted(folders["phi3"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load(folders["phi3"]), tmp_path)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model), logits(load(folders["phi3"])), rtol=1e-5, atol=1e-5)
    anew = PeftConfig.from_pretrained(tmp_path)
    anew.inference_mode = False
    torch.testing.assert_close(
        logits(get_peft_model(load(folders["phi3"]), anew)), logits(load(folders["phi3"])), rtol=1e-5, atol=1e-5
    )


def test_trls_way_to_copy_an_adapter_copies_it_whole(folders):
    """Its DPO trainer copies every parameter with `.default.` in its name to that with `.ref.`."""
    model = adapted(folders["phi3"], base=None)
    for layer in layers_of(model).values():
        layer.sorsa_initial["default"].U.data.mul_(0.9)
    changed = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model), changed)


def test_two_adapters_by_turns_and_at_once(folders):
    """With both active the changes of the weights add up."""
    model = adapted(folders["phi3"])
    first = logits(model)
    model.add_adapter("second", SorsaConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"]))
    moved(model, 0.3, "second", seed=1)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert (logits(model) - first).abs().max() > 0.1
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    plain = load(folders["phi3"])
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            weight = plain.get_parameter(f"{name.removeprefix('base_model.model.')}.weight")
            weight += sum(layer.get_delta_weight(one) for one in ("default", "second"))
    torch.testing.assert_close(both, logits(plain), rtol=1e-4, atol=1e-4)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_only_the_factors_are_trained_and_counted(folders, capsys):
    model = adapted(folders["llama-tied-bias"], move=0)
    expected = sum(
        4 * (layer.in_features + layer.out_features + 1) for layer in layers_of(model).values()
    )  # r (m + n + 1)
    assert model.get_nb_trainable_parameters()[0] == expected
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,}" in capsys.readouterr().out
    model.train()(INPUT, labels=INPUT).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".sorsa_factors." in name), name


def test_factors_stay_in_fp32_over_a_bf16_model_and_orthonormal(folders):
    """PEFT rounds its other methods' adapters to the base model's dtype on their way to fp32."""
    model = adapted(folders["phi3"], move=0, base=load(folders["phi3"], dtype=torch.bfloat16))
    for layer in layers_of(model).values():
        U = layer.sorsa_factors["default"].U
        assert U.dtype == torch.float32
        assert (U.T @ U - torch.eye(4)).norm() < 1e-5
    assert torch.equal(logits(model), logits(load(folders["phi3"], dtype=torch.bfloat16)))
    narrow = get_peft_model(
        load(folders["phi3"], dtype=torch.bfloat16),
        SorsaConfig(r=4, target_modules="all-linear"),
        autocast_adapter_dtype=False,
    )
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base(tmp_path, bits, monkeypatch):
    """The base stays packed as it is; the decomposition is that of its dequantised weights."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", bitsandbytes.functional.has_avx512bf16)
    quantised = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )

    # On CPUs with bf16 instructions bitsandbytes multiplies 4-bit weights in blocks of 32 outputs and 64 inputs.
    size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    torch.manual_seed(0)
    config = Phi3Config(**size, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")

    def packed():
        return load(tmp_path / "base", quantization_config=quantised, device_map="cpu")

    before = logits(packed())
    model = adapted(tmp_path / "base", move=0, base=packed())
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    assert all(isinstance(layer.get_base_layer(), kind) for layer in layers_of(model).values())
    assert any(layer.quantization_backend is not None for layer in layers_of(model).values())
    layer = next(iter(layers_of(model).values()))
    weight = layer.get_base_weight().float()
    after = logits(model)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.get_base_weight().float(), weight, rtol=2**-7, atol=0)
    assert torch.equal(logits(model), after), "looking at the weight changes nothing"
    expected = torch.linalg.svdvals(weight)[:4]
    torch.testing.assert_close(layer.sorsa_factors["default"].s.detach(), expected, rtol=1e-3, atol=1e-3)
    changed = logits(moved(model, 0.2))
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(packed(), tmp_path / "adapter")), changed)
    model.train()(INPUT, labels=INPUT).loss.backward()
    assert layer.sorsa_factors["default"].U.grad.abs().max() > 0


def test_it_becomes_a_lora_by_pefts_own_conversion(folders):
    model = adapted(folders["phi3"], target_modules=["qkv_proj"])
    changed = logits(model)
    config, tensors = convert_to_lora(model, rank=8)  # the change has rank 2 r
    lora = get_peft_model(load(folders["phi3"]), config)
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(logits(lora.eval()), changed, rtol=1e-3, atol=1e-3)


def test_it_is_injected_into_a_model_without_a_wrapper(folders):
    model = inject_adapter_in_model(SorsaConfig(r=4, target_modules=["qkv_proj"]), load(folders["phi3"]))
    assert len(layers_of(model)) == 2
    torch.testing.assert_close(logits(model), logits(load(folders["phi3"])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (dict(r=0), ValueError, "positive integer"),
        (dict(rank_pattern={"qkv_proj": -1}), ValueError, "positive integer"),
        (dict(sorsa_dropout=1.0), ValueError, "sorsa_dropout"),
        (dict(sorsa_alpha=-1.0), ValueError, "sorsa_alpha"),
        (dict(svd="fast"), ValueError, "svd"),
        (dict(bias="some"), ValueError, "bias"),
        (dict(target_modules="all-linear", layers_to_transform=[0]), ValueError, "layers_to_transform"),
        (dict(lora_alpha=3), TypeError, "lora_alpha"),
    ],
)
def test_a_wrong_configuration_is_refused(config, error, message):
    with pytest.raises(error, match=message):
        SorsaConfig(**config)


@pytest.mark.parametrize(
    ("targets", "rank", "error", "message"),
    [
        (["qkv_proj"], 41, ValueError, r"model\.layers\.0\.self_attn\.qkv_proj: `r` \(41\) must be in 1 \.\. 40"),
        (["embed_tokens"], 4, TypeError, "Target module Embedding.* is not supported"),
        (["norm"], 4, TypeError, "Target module Phi3RMSNorm.* is not supported"),
        (["nothing"], 4, ValueError, "not found in the base model"),
    ],
)
def test_what_cannot_be_adapted_is_refused(folders, targets, rank, error, message):
    with pytest.raises(error, match=message):
        get_peft_model(load(folders["phi3"]), SorsaConfig(r=rank, target_modules=targets))


def test_a_batch_of_mixed_adapters_is_refused_and_not_computed_with_one(folders):
    with pytest.raises(ValueError, match="adapter_names"):
        adapted(folders["phi3"])(INPUT, adapter_names=["__base__", "default"])
    with pytest.raises(AttributeError, match="add_weighted_adapter"):
        adapted(folders["phi3"]).add_weighted_adapter(["default"], [1.0], "sum")


def test_a_convolution_is_refused():
    with pytest.raises(TypeError, match="Target module Conv1d"):
        get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 1)), SorsaConfig(r=1, target_modules=["0"]))


def test_the_name_is_a_member_of_pefts_enum():
    assert PeftType("SORSA") is PeftType.SORSA is PeftType["SORSA"]
    assert "SORSA" in list(PeftType)
    assert list(PeftType.__members__)[-1] == "SORSA"
    assert pickle.loads(pickle.dumps(PeftType.SORSA)) is PeftType.SORSA
    assert copy.deepcopy(PeftType.SORSA) is PeftType.SORSA
    assert {PeftType.SORSA: 1}[PeftType("SORSA")] == 1
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SORSA"] is SorsaConfig
    assert json.loads(json.dumps(PeftType.SORSA)) == "SORSA"
    with pytest.raises(AttributeError):
        PeftType.SORSA = "OTHER"
    with pytest.raises(ValueError):
        PeftType("SORSAX")


def test_registering_again_changes_nothing_and_another_sorsa_is_not_replaced(monkeypatch):
    peft_type.register_sorsa(SorsaConfig, SorsaModel)
    assert list(PeftType.__members__).count("SORSA") == 1

    class Theirs(PeftConfig):
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.SORSA, Theirs)
    with pytest.raises(ImportError, match=r"has a method SORSA of its own.*peft>=0.21.2"):
        peft_type.register_sorsa(SorsaConfig, SorsaModel)


@pytest.mark.slow
def test_peft_reads_an_adapter_in_a_fresh_process_that_has_imported_the_room(folders, tmp_path):
    model = adapted(folders["phi3"])
    model.save_pretrained(tmp_path)
    program = (
        "import sys, torch, sorsa_ds.peft\nfrom peft import AutoPeftModelForCausalLM\n"
        "assert 'deepspeed' not in sys.modules and 'sorsa_ds.train' not in sys.modules\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "torch.save(model(torch.arange(1, 25).view(2, 12) % 64).logits, sys.argv[2])\n"
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folders["phi3"])
    subprocess.run([sys.executable, "-c", program, tmp_path, tmp_path / "logits.pt"], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model), rtol=1e-5, atol=1e-5)


def test_the_defaults_are_the_trainers():
    from sorsa_ds.config.schema import AdapterConfig
    from sorsa_ds.config.schema import SorsaConfig as Trainers

    ours, shared, theirs = SorsaConfig(), AdapterConfig(), Trainers()
    assert (ours.r, ours.sorsa_alpha, ours.sorsa_dropout) == (shared.rank, shared.alpha, shared.dropout)
    assert ours.use_rslora == shared.rslora
    assert ours.decomposition() == theirs


@pytest.mark.parametrize(
    ("choice", "first"), [({"triplets": "trailing"}, -4), ({"triplets": "window", "window_start": 3}, 3)]
)
def test_other_triplets_than_the_leading_ones(folders, choice, first):
    """The layer begins with the triplets that were asked for, and computes what the base model does."""
    base, model = load(folders["phi3"]), adapted(folders["phi3"], move=0.0, **choice)
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-5, atol=1e-5)
    name = "model.layers.0.self_attn.qkv_proj"
    expected = torch.linalg.svdvals(base.get_submodule(name).weight.double())
    window = slice(first, None) if first < 0 else slice(first, first + 4)
    s = model.base_model.model.get_submodule(name).sorsa_factors["default"].s
    torch.testing.assert_close(s.detach().double(), expected[window], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "choice",
    [
        {"triplets": "first"},
        {"window_start": 3},
        {"triplets": "window", "window_start": -1},
        {"triplets": "null_space"},
        {"directions": "file"},
    ],
)
def test_a_choice_of_triplets_that_is_none_is_refused(choice):
    with pytest.raises(ValueError, match="triplets|window_start|directions"):
        SorsaConfig(**choice)


def test_an_adapter_begins_where_a_file_of_directions_says(folders, tmp_path):
    """The layer's V spans the directions, and it computes what the base model does."""
    base, file, found = load(folders["phi3"]), tmp_path / "directions.safetensors", {}
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            directions = torch.linalg.qr(torch.randn(module.in_features, 6))[0].t().contiguous()
            found[name] = Directions(directions, probe_of(name, module.weight.detach()))
    write_directions(file, found, Origin("phi3", "none", 0))
    model = adapted(folders["phi3"], move=0.0, triplets="null_space", directions=str(file))
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-5, atol=1e-5)
    name = "model.layers.0.self_attn.qkv_proj"
    V = model.base_model.model.get_submodule(name).sorsa_factors["default"].V.detach()
    wanted = found[name].directions_KN[: V.shape[1]]
    torch.testing.assert_close(V @ V.t(), wanted.t() @ wanted, rtol=0, atol=1e-5)


def test_nothing_is_warned_of_on_the_ordinary_way(folders, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted(folders["phi3"]).save_pretrained(tmp_path)
        PeftModel.from_pretrained(load(folders["phi3"]), tmp_path)
    assert CONFIGS["phi3"].num_hidden_layers == 2
