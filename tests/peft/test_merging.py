"""SORSA in PEFT while it is merged into the base model: what programs take for that model, and what comes back."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from sorsa_ds.peft import SorsaConfig
from sorsa_ds.peft.convert import from_peft
from tests.helpers.architectures import save
from tests.helpers.peft_models import adapted, layers_of, load, logits, moved


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model on disk."""
    return save("phi3", tmp_path_factory.mktemp("phi3"))


def sent_by_trl(model):
    """The names that TRL's trainers send to vLLM, by both of its ways, with the shapes."""
    from trl.experimental.async_grpo.async_grpo_trainer import _iter_vllm_named_params
    from trl.generation.vllm_generation import VLLMGeneration

    own = object.__new__(VLLMGeneration)
    own.model = model
    own._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda _: torch.no_grad())
    first = {name: tuple(value.shape) for name, value in own._iter_named_params()}
    model.merge_adapter()
    second = {name: tuple(value.shape) for name, value in _iter_vllm_named_params(model)}
    model.unmerge_adapter()
    return first, second


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_trl_sends_vllm_the_base_models_weights_and_nothing_else(folder):
    """It tells an adapter's parameters by the prefix of the method, and vLLM knows no others."""
    expected = {name: tuple(value.shape) for name, value in load(folder).named_parameters()}
    for sent in sent_by_trl(adapted(folder)):
        assert sent == expected


@pytest.mark.parametrize("trainable", [False, True])
def test_initial_factors_are_never_trained(folder, tmp_path, trainable):
    adapted(folder).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load(folder), tmp_path, is_trainable=trainable)
    model.add_adapter("second", SorsaConfig(r=2, target_modules="all-linear"))
    model.set_adapter("second")
    model.set_adapter("default", inference_mode=not trainable)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (trainable and ".sorsa_factors.default." in name), name


def test_an_adapter_with_the_earlier_name_of_the_initial_factors_is_read(folder, tmp_path):
    model = adapted(folder)
    model.save_pretrained(tmp_path / "now")
    model.save_pretrained(tmp_path / "before")
    file = tmp_path / "before" / "adapter_model.safetensors"
    tensors = {name.replace("sorsa_initial", "initial_factors"): value for name, value in load_file(file).items()}
    assert sum(".initial_factors." in name for name in tensors) * 2 == len(tensors)
    save_file(tensors, file)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(load(folder), tmp_path / "before", low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(again), logits(model))
    for name in ("now", "before"):
        from_peft(tmp_path / name, tmp_path / f"ours-{name}")
    for name in ("trained_factors.safetensors", "initial_factors.safetensors"):
        ours, theirs = (load_file(tmp_path / f"ours-{one}" / name) for one in ("now", "before"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind", ["phi3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("move", [0.01, 2.0])
def test_the_base_model_comes_back_bit_for_bit_after_many_merges(tmp_path, kind, dtype, move):
    """As a trainer does it that merges before each generation, while the factors move on."""
    place = save(kind, tmp_path)
    before = load(place, dtype=dtype)
    model = adapted(place, move=move, base=load(place, dtype=dtype))
    model.add_adapter("second", SorsaConfig(r=2, target_modules="all-linear"))
    moved(model, move, "second", seed=1)
    for seed in range(20):
        model.merge_adapter(["default", "second"] if seed % 2 else ["default"])
        model.unmerge_adapter()
        moved(model, 0.01, seed=seed)
    for name, layer in layers_of(model).items():
        weight = before.get_parameter(f"{name.removeprefix('base_model.model.')}.weight")
        assert torch.equal(layer.get_base_layer().weight, weight), name


def test_what_is_kept_of_a_weight_is_small_where_its_change_is_small():
    from sorsa_ds.peft.kept_weight import KeptNumbers

    torch.manual_seed(0)
    weight = torch.randn(512, 512, dtype=torch.bfloat16)
    for size, most in ((1e-3, 0.02), (100.0, 1.0)):
        change = size * torch.randn(512, 512)
        merged = (weight.float() + change).bfloat16()
        back = (merged.float() - change).bfloat16()
        kept = KeptNumbers.of(weight, back)
        assert torch.equal(kept.correct(back.clone()), weight)
        held = sum(one.numel() * one.element_size() for one in (kept.places, kept.values) if one is not None)
        assert held <= most * 2 * weight.numel()
        assert kept.correct(back.float()).dtype == torch.float32, "cast meanwhile: what it is up to rounding"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_base_comes_back_bit_for_bit(folder, bits):
    quantised = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = load(folder, quantization_config=quantised, device_map="cpu")
    before = logits(base)
    model = adapted(folder, base=base)
    model.add_adapter("second", SorsaConfig(r=2, target_modules="all-linear"))
    moved(model, 0.3, "second", seed=1)
    changed = logits(model)
    for names in (["default"], ["default", "second"], ["second"]) * 2:
        model.merge_adapter(names)
        assert (logits(model) - before).abs().max() > 0.1
        model.unmerge_adapter()
    assert torch.equal(logits(model), changed)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert (logits(model.merge_and_unload()) - before).abs().max() > 0.1


def test_an_adapter_that_is_added_over_a_merged_one_begins_at_the_base_model(folder):
    model = adapted(folder, move=0.5)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("second", SorsaConfig(r=4, target_modules="all-linear"))
    for layer in layers_of(model).values():
        first, second = (layer.sorsa_initial[name].s for name in ("default", "second"))
        assert torch.equal(first, second)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(load(folder)), rtol=1e-5, atol=1e-5)


def test_a_merged_adapter_that_was_deleted_stays_in_the_weight(folder):
    """And the one below it is taken out as it would be without what is kept."""
    model = adapted(folder)
    model.add_adapter("second", SorsaConfig(r=2, target_modules="all-linear"))
    moved(model, 0.5, "second", seed=1)
    layer = next(iter(layers_of(model).values()))
    expected = layer.get_base_weight() + layer.get_delta_weight("second")
    layer.merge(adapter_names=["default", "second"])
    layer.delete_adapter("second")
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_weight(), expected.detach(), rtol=1e-5, atol=1e-5)
