"""Tiny random models of every family that transformers has: a default configuration, each of its fields shrunk by name.

What a field means follows from its name, which the families of transformers share. What a family needs beside that is
in `HINTS`.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from sorsa_ds.runtime import digest

LAYERS, VOCABULARY, WIDTH, POSITIONS = 4, 512, 64, 128

_SIZES: dict[int, str] = {
    VOCABULARY: """
        vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size unpadded_vocab_size
        ngram_vocab_size_base encoder_hash_byte_group_vocab codebook_size shape_vocab_size pronunciation_vocab_size
    """,
    WIDTH: """
        hidden_size d_model n_embd dim embedding_dim emb_dim lru_width embed_dim word_embed_proj_dim
        output_embedding_size projector_input_dim projector_output_dim out_hidden_size output_channels
        adapter_out_dim backbone_hidden_size attention_hidden_size text_hidden_size ple_embed_dim audio_hidden_size
        projection_dim hidden_size_global mamba_d_ssm adapter_in_dim adapter_input_size downsample_hidden_size
        proj_dim
    """,
    96: """
        intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner dff dim_ff ffn_hidden_size n_inner
        feed_forward_size mlp_dim shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp
        moe_shared_expert_intermediate_size dense_intermediate_size shared_experts_intermediate_size
    """,
    48: """
        moe_intermediate_size expert_ffn_hidden_size
    """,
    POSITIONS: """
        max_position_embeddings n_positions max_seq_len max_source_positions context_length max_target_positions
        n_ctx model_max_length original_max_position_embeddings
    """,
    32: """
        qk_head_dim kv_lora_rank q_lora_rank o_lora_rank hidden_size_per_layer_input sliding_window
        sliding_window_size attention_window_size block_size embedding_size input_embedding_size local_attention
        chunk_size mamba_chunk_size index_topk router_hidden_size pronunciation_embed_dim shape_embed_dim image_size
        local_attn_chunk_length lsh_attn_chunk_length window_size attention_chunk_size bias_max_distance
        position_bias_max_distance local_attention_window_len keep_window_size vision_output_dim base_channels
        num_filters vision_hidden_size
    """,
    16: """
        head_dim kv_channels d_kv d_head dim_head v_head_dim qk_nope_head_dim index_head_dim global_head_dim
        swa_head_dim attention_head_size linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state
        state_size ssm_state_size laurel_rank adapter_rank hc_lowrank mamba_head_dim mamba_d_head mamba_headdim
        qk_rope_head_dim time_step_rank mamba_dt_rank swa_v_head_dim position_bias_num_buckets patch_size
        prompt_length num_mel_bins index_block_size attention_head_dim gated_norm_rank codebook_dim expert_rank
    """,
    8: """
        rotary_dim d_rel max_num_tiles num_position_embeddings
    """,
    4: """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        linear_num_value_heads swa_num_attention_heads linear_num_heads num_encoder_attention_heads
        num_decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts index_n_heads
        conf_num_attention_heads num_expert_group_size zero_expert_num upsample_groups num_quantizers num_codebooks
        mm_tokens_per_image split_ngram_parts
    """,
    2: """
        num_key_value_heads num_kv_heads kv_n_heads num_global_key_value_heads linear_num_key_heads
        swa_num_key_value_heads num_experts_per_tok moe_topk moe_top_k num_experts_per_token moe_k top_k_experts
        encoder_layers decoder_layers num_encoder_layers num_decoder_layers depth num_global_layers
        conf_num_hidden_layers num_residual_layers index_topk_blocks ngram_size num_layers_per_stack
    """,
    1: """
        n_group topk_group num_expert_group num_kv_shared_layers n_groups mamba_n_groups mamba_ngroups
        first_k_dense_replace num_dense_layers moe_layer_start_index num_res_blocks num_nextn_predict_layers
        num_random_blocks original_window_size
    """,
}
TINY = {name: size for size, names in _SIZES.items() for name in names.split()}
"""Field of a configuration -> its value in a tiny model, where the default is larger."""

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
"""What the number of a decoder's layers is called."""

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_SHARED_BLOCKS = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 2 * WIDTH,
    "attention_head_dim": 32,
}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_MROPE = {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}

HINTS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "blt": {f"{part}vocab_size": VOCABULARY for part in ("", "patcher_config.", "encoder_config.", "decoder_config.")},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 1.0, "ffn_config.moe_num_experts": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config.head_dim": 32},
    "dots3_note_text": {"head_dim": 32},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 2 * WIDTH},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "gemma4_assistant": {
        "text_config.hidden_size_per_layer_input": 0,
        "text_config.vocab_size_per_layer_input": 0,
    },
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8},
    **dict.fromkeys(("glm4v", "qwen2_5_vl", "qwen2_vl"), _MROPE),
    "qwen4_exp": {f"text_config.{name}": value for name, value in _INDEXER.items()},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"vocab_size": VOCABULARY, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "rwkv": {"rescale_every": 0},  # at inference only, for fp16, and it moves LayerNorm's epsilon
    "xmod": {"default_language": "en_XX"},
    "zamba": _SHARED_BLOCKS,
    "zamba2": {**_SHARED_BLOCKS, "hybrid_layer_ids": [1, 3], "num_mem_blocks": 1},
}
"""Family -> fields that its configuration needs beside the general rules, dotted where they lie in a part of it."""

WHOLE = (
    "aya_vision", "glm4v", "idefics3", "internvl", "llama4", "llava", "mistral3", "mllama", "paligemma", "qwen2_5_vl",
    "qwen2_vl", "qwen3_5", "qwen3_vl", "smolvlm",
)  # fmt: skip
"""Families that see, whose class with vision is another than that of their language model alone."""

_INDICES = ("_layers", "_ids", "_idxs", "_indexes", "_indices")
"""How the names of lists end that hold the numbers of layers."""


def tiny_config(family: str) -> PreTrainedConfig:
    """The default configuration of a family with every size in it shrunk.

    Raises:
        Exception: whatever transformers says of a configuration that it does not take.
    """
    kind, asked = CONFIG_MAPPING[family], _nested(HINTS.get(family, {}))
    try:
        whole = kind().to_dict()
    except Exception:  # a default that does not pass its own checks
        whole = kind(**asked).to_dict()
    config = kind.from_dict(_shrunk(_merged(whole, asked), asked))
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    return config


def model_class(family: str, whole: bool = False) -> type[PreTrainedModel]:
    """The class of a family's language model. whole: with what it has beside text, where it has such a class."""
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if whole else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return getattr(transformers, names[family])


def write_tiny_model(family: str, folder: Path, whole: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a tiny random model of a family, see `tiny_model`.

    Rounded to bf16 by default: then buffers that a model makes in another dtype than its weights show.
    """
    tiny_model(family, whole).to(dtype).save_pretrained(folder)


def tiny_model(family: str, whole: bool = False) -> PreTrainedModel:
    """A tiny random model of a family in float32.

    Every parameter and stored buffer is random, biases and norms too, and so large that each moves the logits.

    Args:
        whole: with its vision or audio part, where the family has a class for that.

    Raises:
        Exception: whatever transformers says of a family that it cannot build.
    """
    torch.manual_seed(int(digest.of_bytes(family.encode())[:8], 16))
    kind = model_class(family, whole)
    if not issubclass(kind, PreTrainedModel):
        raise ValueError(f"transformers cannot make {kind.__name__} here")
    config = tiny_config(family)
    if kind.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    model = kind._from_config(config)
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give a model random weights of about unit gain, and move all else off the values that it begins with."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            matrices = isinstance(module, nn.Linear | nn.Embedding | Conv1D) or parameter.ndim > 2
            if matrices and parameter.ndim > 1:
                fan_in = 1 if isinstance(module, nn.Embedding) else parameter.shape[-1]
                parameter.normal_(std=fan_in**-0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                noise = 0.1 * torch.randn_like(buffer)
                buffer.add_(noise if not buffer.any() else noise * buffer)  # the zeros of a mask stay zeros


def _nested(hints: dict[str, Any]) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    for name, value in hints.items():
        *parts, leaf = name.split(".")
        within = asked
        for part in parts:
            within = within.setdefault(part, {})
        within[leaf] = value
    return asked


def _merged(values: dict, asked: dict) -> dict:
    """A configuration with what is asked for in it, part by part."""
    inside = {k: _merged(values.get(k) or {}, v) if isinstance(v, dict) else v for k, v in asked.items()}
    return {**values, **inside}


def _shrunk(values: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """A configuration, or a part of one, in small. asked: the fields that are not to be touched."""
    depth = next((values[name] for name in DEPTHS if isinstance(values.get(name), int)), 0)
    kept = _kept_layers(values, depth)
    latent_attention = "kv_lora_rank" in values
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name in asked and not isinstance(value, dict):
            made[name] = value
        elif name == "per_layer_config" and isinstance(value, dict):
            made[name] = _shrunk_overrides(value, kept, values)
        elif isinstance(value, dict):
            made[name] = _shrunk(value, asked.get(name, {}))
        elif name in DEPTHS and isinstance(value, int):
            made[name] = min(value, LAYERS)
        elif isinstance(value, list) and depth > LAYERS:
            made[name] = _shrunk_list(name, value, depth, kept)
        elif latent_attention and name == "num_key_value_heads" and value == values.get("num_attention_heads"):
            made[name] = TINY["num_attention_heads"]
        elif isinstance(value, int) and not isinstance(value, bool) and name in TINY:
            made[name] = min(value, TINY[name])
        elif str(name).endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCABULARY:
            made[name] = VOCABULARY - 1 - value % 50
        else:
            made[name] = value
    return made


def _kept_layers(values: dict[str, Any], depth: int) -> list[int]:
    """The layers that a tiny model keeps of those of the default: one of every kind, then the first ones."""
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == depth]
    overrides = {int(layer): fields for layer, fields in (values.get("per_layer_config") or {}).items()}
    kinds = [str(([one[layer] for one in lists], overrides.get(layer))) for layer in range(depth)]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:LAYERS]
    return sorted([*first, *(layer for layer in range(depth) if layer not in first)][:LAYERS])


def _shrunk_list(name: str, value: list, depth: int, kept: list[int]) -> list:
    if len(value) == depth:
        chosen = [value[layer] for layer in kept]
        return [min(entry, TINY[name]) for entry in chosen] if name in TINY else chosen
    if name.endswith(_INDICES) and all(type(entry) is int for entry in value):
        return [place for place, layer in enumerate(kept) if layer in value]
    return value


def _shrunk_overrides(value: dict, kept: list[int], values: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What some layers have otherwise than the others: a larger value stays larger."""
    made = {}
    for place, layer in enumerate(kept):
        fields = next((fields for key, fields in value.items() if int(key) == layer), {})
        if fields:
            small = _shrunk(fields, {})
            made[place] = {
                k: small[k] * 2 if k == "head_dim" and v > values[k] else small[k] for k, v in fields.items()
            }
    return made
