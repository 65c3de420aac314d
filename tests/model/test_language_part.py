"""Models that also see or hear: their class, their language model, and what is never adapted."""

import pytest
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, T5Config, XLNetConfig

from benchmarks.helpers.tiny_models import model_class as class_of
from benchmarks.helpers.tiny_models import tiny_config
from sorsa_ds.config.schema import AdapterConfig
from sorsa_ds.model.language_part import in_language_part, model_class, most_positions
from sorsa_ds.model.selection import choose


def bare(family: str, whole: bool = False):
    """A tiny model without memory for its parameters."""
    with init_empty_weights():
        return class_of(family, whole)._from_config(tiny_config(family))


@pytest.mark.parametrize(
    ("family", "named", "kind"),
    [
        ("llama", None, AutoModelForCausalLM),
        ("gemma3", None, AutoModelForCausalLM),
        ("gemma3", "Gemma3ForConditionalGeneration", AutoModelForMultimodalLM),
        ("llama4", "Llama4ForConditionalGeneration", AutoModelForMultimodalLM),
        ("llama4", "Llama4ForCausalLM", AutoModelForCausalLM),
        ("qwen2_vl", None, AutoModelForMultimodalLM),
    ],
)
def test_a_checkpoint_is_taken_in_the_class_that_it_names(family, named, kind):
    config = tiny_config(family)
    config.architectures = named and [named]
    assert model_class(config) is kind


def test_an_architecture_without_a_language_model_is_refused_by_name():
    with pytest.raises(ValueError, match="no causal language model of the architecture 't5'"):
        model_class(T5Config())


@pytest.mark.parametrize(
    ("family", "whole", "inside", "outside"),
    [
        ("gemma3", False, "model.language_model.layers.0.mlp.up_proj", "model.multi_modal_projector"),
        ("gemma3", False, "model.language_model.embed_tokens", "model.vision_tower.encoder.layers.0.mlp.fc1"),
        ("phi4_multimodal", False, "model.layers.0.mlp.down_proj", "model.embed_tokens_extend.image_embed"),
        ("qwen2_vl", True, "model.language_model.layers.1.self_attn.q_proj", "model.visual.merger.mlp.0"),
    ],
)
def test_towers_and_what_lies_around_them_are_no_part_of_the_language_model(family, whole, inside, outside):
    model = bare(family, whole)
    assert model.get_submodule(inside) is not model.get_submodule(outside)
    is_text = in_language_part(model)
    assert is_text(inside) and not is_text(outside)


def test_all_of_a_language_model_is_text():
    is_text = in_language_part(bare("llama"))
    assert is_text("lm_head") and is_text("model.layers.0.mlp.up_proj")


def test_towers_are_never_adapted_and_told_or_refused_by_name():
    model = bare("gemma3")
    chosen = choose(model, AdapterConfig(rank=4))
    assert all(target.name.startswith("model.language_model.") for target in chosen.targets)
    assert len(chosen.targets) == 28 and chosen.share > 0.98 and chosen.warning is None
    assert "out of the language model" in dict(chosen.rows())["left out"].replace("outside of", "out of")
    with pytest.raises(ValueError, match=r"vision_tower.*fc1 cannot be adapted, since it lies outside of the language"):
        choose(model, AdapterConfig(rank=4, targets=["fc1"]))


def test_a_length_of_minus_one_is_no_limit():
    assert most_positions(XLNetConfig()) is None
    assert most_positions(tiny_config("gemma3")) == 128
