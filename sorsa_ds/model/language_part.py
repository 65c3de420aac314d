"""The language model within a model that also sees or hears: training on text reaches nothing else."""

from collections.abc import Callable
from typing import cast

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForMultimodalLM]:
    """Which of transformers' classes makes the model of a configuration, and loads all of its weights.

    A checkpoint whose configuration names a class with vision or audio, such as Gemma3ForConditionalGeneration, is
    taken in that class, even where transformers could make its language model alone: the export is whole then.
    """
    multimodal, causal = (auto._model_mapping for auto in (AutoModelForMultimodalLM, AutoModelForCausalLM))
    kind = type(config)
    if kind not in multimodal:
        return AutoModelForCausalLM
    named = config.architectures or [""]
    seeing = kind not in causal or multimodal[kind].__name__ == named[0]
    return AutoModelForMultimodalLM if seeing else AutoModelForCausalLM


def in_language_part(model: nn.Module) -> Callable[[str], bool]:
    """Tells of a module's or parameter's name whether it belongs to what reads and writes text.

    That is all of a language model, and of a larger one the modules that are made from the text's part of its
    configuration. What gives the logits lies outside of these in some models, and is no part here.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PreTrainedConfig) else None
    if text is None or text is config:
        return lambda name: True
    parts = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) is type(text)
    ]
    return lambda name: not parts or name.startswith(tuple(parts))


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that says how many tokens a model knows and how long a text may be."""
    return cast(PreTrainedConfig, config.get_text_config())
