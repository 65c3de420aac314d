"""How far packed rows are from their examples one by one: losses and gradients of small random models in fp32.

The models stand for the kinds of attention that there are: full, windows, chunks, attention sinks, rotary, learned and
no positions, experts, latent keys, and models that do not hand their positions on to transformers' masks.
"""

import numpy as np
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from sorsa_ds.data.batches import collate
from sorsa_ds.data.packing import collate_packed
from sorsa_ds.data.tokenize import IGNORED, Example
from sorsa_ds.train.loss import summed_loss

_DECODER = dict(
    hidden_size=40, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_WINDOW = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
_EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
_GPT = dict(n_embd=40, n_layer=2, n_head=4, n_positions=64)
FAMILIES: dict[str, dict] = {
    "llama": {}, "phi3": {}, "gpt_neox": {}, "granite": {}, "phi": dict(num_attention_heads=5, num_key_value_heads=5),
    "mistral": dict(sliding_window=6),
    "qwen2": dict(use_sliding_window=True, max_window_layers=1, sliding_window=6),
    "qwen3": dict(head_dim=12), "gemma2": dict(head_dim=12, **_WINDOW), "gemma3_text": dict(head_dim=12, **_WINDOW),
    "cohere2": _WINDOW, "olmo3": _WINDOW,
    "llama4_text": dict(head_dim=12, attention_chunk_size=6, num_local_experts=4, intermediate_size_mlp=76,
                        layer_types=["chunked_attention", "full_attention"]),
    "gpt_oss": dict(head_dim=12, num_local_experts=4, num_experts_per_tok=2, **_WINDOW),
    "mixtral": dict(num_local_experts=4), "qwen3_moe": dict(head_dim=12, num_experts=4, **_EXPERTS),
    "deepseek_v3": dict(n_routed_experts=4, n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16,
                        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
                        num_key_value_heads=4, **_EXPERTS),
    "gpt2": _GPT, "gptj": dict(**_GPT, rotary_dim=4),
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=6),
    "opt": dict(ffn_dim=76, word_embed_proj_dim=40), "falcon": dict(alibi=False),
}  # fmt: skip
"""Architecture -> what its small configuration has beside the common fields."""
ROWS = ((9, 14, 2, 21), (17,), (1, 5, 3))
"""Tokens of each example of each packed row: windows and chunks end inside examples, and rows have padding."""


def config_of(family: str, **fields) -> PreTrainedConfig:
    """The small configuration of an architecture. fields: what it has beside the common ones and those of FAMILIES."""
    return CONFIG_MAPPING[family](**{**_DECODER, **FAMILIES.get(family, {}), **fields})


def model_of(config: PreTrainedConfig, kernel: str | None = None) -> nn.Module:
    """A random model without dropout. kernel: None for the one that transformers chooses."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()


def made_up(lengths: tuple[int, ...], seed: int = 0) -> list[Example]:
    """A random example of each length. The last two thirds of it are learned, which may begin with its first token."""
    generator = np.random.default_rng(seed)
    examples: list[Example] = []
    for length in lengths:
        ids = generator.integers(3, 64, length, dtype=np.int32)
        examples.append({"input_ids": ids, "labels": np.where(np.arange(length) < length // 3, IGNORED, ids)})
    return examples


def differences(model: nn.Module, rows: tuple[tuple[int, ...], ...] = ROWS) -> tuple[float, float]:
    """Relative differences of the loss and of its gradient, between packed rows and their examples one by one."""
    packed = [made_up(lengths, seed) for seed, lengths in enumerate(rows)]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def taken(batches: list[dict]) -> tuple[float, torch.Tensor]:
        loss, gradient = 0.0, torch.zeros(sum(p.numel() for p in parameters))
        for batch in batches:
            one = summed_loss(model, batch)
            parts = torch.autograd.grad(one, parameters, allow_unused=True, materialize_grads=True)
            gradient += torch.cat([part.flatten() for part in parts])
            loss += one.item()
        return loss, gradient

    loss, gradient = taken([collate_packed(packed, 0)])
    wanted, direction = taken([collate([example], 0) for row in packed for example in row])
    return abs(loss - wanted) / wanted, float((gradient - direction).norm() / direction.norm())


def packed_loss_difference() -> float:
    """The largest relative difference of a loss, over all families with the attention that transformers chooses."""
    return max(differences(model_of(config_of(family)))[0] for family in FAMILIES)
