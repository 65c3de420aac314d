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

    That is all of a language model. Of a model that also sees or hears it is what is made from the text's part of the
    configuration, where that is a part. A tower that takes no text never belongs to it, nor what lies around the tower
    (among the modules that hold it, the largest without the embeddings of tokens). What gives the logits is no part
    here in models that have it beside the language model.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return lambda name: True
    text = config.get_text_config()
    inside = [""] if text is config else _made_from(model, type(text))
    outside = _towers(model)
    return lambda name: _lies_in(name, inside or [""]) and not _lies_in(name, outside)


def _made_from(model: nn.Module, kind: type[PreTrainedConfig]) -> list[str]:
    """The names of the models in a model that are made from a kind of configuration."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) is kind
    ]


def _towers(model: nn.Module) -> list[str]:
    """The names of the parts of a model that text does not reach, because they belong to a tower that takes none."""
    modules = dict(model.named_modules())
    find_embeddings = getattr(model, "get_input_embeddings", None)
    embeddings = find_embeddings() if find_embeddings else None
    needed = {name for name, module in modules.items() if module is embeddings}
    towers = []
    for name, module in modules.items():
        if isinstance(module, PreTrainedModel) and "text" not in _modalities(module):
            largest = name
            while (around := largest.rpartition(".")[0]) and not any(_lies_in(one, [around]) for one in needed):
                largest = around
            towers.append(largest)
    return towers


def _modalities(module: PreTrainedModel) -> tuple[str, ...]:
    named = module.input_modalities
    return (named,) if isinstance(named, str) else tuple(named)


def _lies_in(name: str, parts: list[str]) -> bool:
    return any(part == "" or name == part or name.startswith(f"{part}.") for part in parts)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that says how many tokens a model knows and how long a text may be."""
    return cast(PreTrainedConfig, config.get_text_config())


def most_positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a text may have for the model of a configuration; None where that is not limited."""
    most = getattr(text_config(config), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None
