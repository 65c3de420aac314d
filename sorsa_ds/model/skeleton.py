"""A model on the meta device: all its modules, without memory for its parameters."""

from pathlib import Path

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.model.architectures import register_architecture


def skeleton(folder: Path | str, loading: LoadingConfig) -> PreTrainedModel:
    """The model of a folder with its parameters on the meta device; its buffers (rotary frequencies) are real.

    Raises:
        ValueError: the folder's configuration is not one of a causal language model, or its architecture needs a
            package that is not installed.
    """
    register_architecture(folder)
    attention = None if loading.attn_implementation == "auto" else loading.attn_implementation
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=loading.trust_remote_code)
        if getattr(config, "rescale_every", 0):
            # At inference RWKV halves its output projections in place every few layers, so that fp16 does not
            # overflow; nothing else changes by it, and SORSA's layers have no such weight to halve.
            config.rescale_every = 0
        # GPT-NeoX has the field is_decoder too, and does not look at it.
        if getattr(config, "is_decoder", True) is False and not config.model_type.startswith("gpt_neox"):
            raise ValueError(f'{config.model_type} sees the tokens that it is to predict, without "is_decoder": true')
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, trust_remote_code=loading.trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"model: {folder} cannot be built as a causal language model: {error}") from error
    model.tie_weights()
    return model
