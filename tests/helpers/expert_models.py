"""Small random models that are stored otherwise than transformers holds them, saved to disk as it saves them.

Most are mixtures of experts with one tensor for each expert; the projections of hrm_text are stored fused.
"""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    HrmTextConfig,
    JambaConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

_DECODER = dict(
    hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_MANY = dict(moe_intermediate_size=20, num_experts_per_tok=2)
_LATENT = dict(
    **_DECODER, **_MANY, n_routed_experts=12, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16,
    kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip
EXPERT_CONFIGS = {
    "mixtral": MixtralConfig(**_DECODER, num_local_experts=12),  # two digits: sorted as numbers, not as text
    "qwen2_moe": Qwen2MoeConfig(**_DECODER, **_MANY, num_experts=4, shared_expert_intermediate_size=16),
    "qwen3_moe": Qwen3MoeConfig(**_DECODER, **_MANY, num_experts=12, head_dim=8),
    "olmoe": OlmoeConfig(**_DECODER, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": GptOssConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2, head_dim=8,
                            rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "granitemoe": GraniteMoeConfig(**_DECODER, num_local_experts=4),
    "deepseek_v2": DeepseekV2Config(**{**_LATENT, "num_key_value_heads": 4}),
    "deepseek_v3": DeepseekV3Config(**{**_LATENT, "num_key_value_heads": 4}),
    "glm4_moe": Glm4MoeConfig(**_DECODER, **_MANY, n_routed_experts=4, first_k_dense_replace=1, head_dim=8),
    "llama4": Llama4TextConfig(**_DECODER, intermediate_size_mlp=40, num_local_experts=4, head_dim=8),
    "phimoe": PhimoeConfig(**_DECODER, num_local_experts=4),
    "dbrx": DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "jamba": JambaConfig(**_DECODER, num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                         expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4),
    "hrm_text": HrmTextConfig(**{**_DECODER, "num_key_value_heads": 4}, head_dim=8),
}  # fmt: skip
MIXTURES = [name for name in EXPERT_CONFIGS if name != "hrm_text"]
"""Those that are mixtures of experts."""

STORED_MERGED = ["gpt_oss", "granitemoe", "llama4", "dbrx"]
"""Those that are stored as transformers holds them."""


def random_experts(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of that architecture; every parameter random, norms and biases too."""
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(EXPERT_CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def save_experts(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of that architecture."""
    random_experts(name, dtype).save_pretrained(folder)
    return folder
