"""The language model within a model that also sees or hears: training on text reaches nothing else."""

from collections.abc import Callable
from typing import Any, cast

import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel

ModelClass = type[AutoModelForCausalLM] | type[AutoModelForMultimodalLM] | type[PreTrainedModel]


def model_class(config: PreTrainedConfig) -> ModelClass:
    """Which of transformers' classes loads the model of a configuration with all of its weights.

    A checkpoint whose configuration names a class with vision or audio, such as Gemma3ForConditionalGeneration, is
    taken in that class, even where transformers could make its language model alone: the export is whole then. A
    language model that transformers has, and finds by its name only, is taken by that name.

    Raises:
        ValueError: transformers has no language model of this architecture.
    """
    multimodal, causal = (auto._model_mapping for auto in (AutoModelForMultimodalLM, AutoModelForCausalLM))
    kind, named = type(config), (config.architectures or [""])[0]
    if kind in multimodal and (kind not in causal or cast(type, multimodal[kind]).__name__ == named):
        return AutoModelForMultimodalLM
    own_code = getattr(config, "auto_map", None) or {}
    if kind in causal or "AutoModelForCausalLM" in own_code:
        return AutoModelForCausalLM
    found = getattr(transformers, named, None) if named.endswith("ForCausalLM") else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is kind:
        return found
    raise ValueError(f"transformers has no causal language model of the architecture {config.model_type!r}")


def bare_model(config: PreTrainedConfig, trust_remote_code: bool, **settings: Any) -> PreTrainedModel:
    """A model of a configuration, with new weights, in the class that `model_class` says.

    Args:
        settings: `dtype` and `attn_implementation`, as transformers takes them.

    Raises:
        ValueError: transformers has no language model of this architecture.
    """
    kind = model_class(config)
    if issubclass(kind, PreTrainedModel):
        return kind._from_config(config, **settings)
    return kind.from_config(config, trust_remote_code=trust_remote_code, **settings)


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
