"""Small random models of the architectures that must work, saved to disk as real checkpoints."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RwkvConfig,
)

from sorsa_ds.sorsa.decompose import decompose, stacked

DECODER = dict(
    hidden_size=40, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**DECODER),
    "llama-tied-bias": LlamaConfig(**DECODER, tie_word_embeddings=True, attention_bias=True),
    "mistral": MistralConfig(**DECODER, sliding_window=8),
    "gemma": GemmaConfig(**DECODER, head_dim=12),
    "qwen2": Qwen2Config(**DECODER),
    "qwen3": Qwen3Config(**DECODER, head_dim=12),
    "phi": PhiConfig(**{**DECODER, "num_attention_heads": 5, "num_key_value_heads": 5}),
    "phi3": Phi3Config(**DECODER),  # fused qkv_proj and gate_up_proj
    "gpt2": GPT2Config(n_embd=40, n_layer=2, n_head=4, vocab_size=64, n_positions=64, initializer_range=0.2),
    "rwkv": RwkvConfig(hidden_size=40, attention_hidden_size=40, intermediate_size=76, num_hidden_layers=2,
                       vocab_size=64, context_length=64, rescale_every=1),
}  # fmt: skip
LONGROPE = Phi3Config(
    **DECODER, original_max_position_embeddings=12,
    rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 5, "long_factor": [2.0] * 5},
)  # fmt: skip
"""Its rotary frequencies are others in a call with more than 12 positions."""


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of that architecture; every parameter random, norms and biases too."""
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def exactly(target, weight, digest=None):
    """A factor source: the exact decomposition, no cache."""
    return _each(target, weight, "exact", 1e-3)


def randomly(target, weight, digest=None):
    """A factor source: the randomised decomposition, no cache."""
    return _each(target, weight, "randomized", 1e-4)


def _each(target, weight, method, tolerance):
    """The decomposition of a linear's weight, or of each expert's."""
    found = [decompose(matrix, target.rank, target.name, method, tolerance) for matrix in target.each(weight)]
    return stacked(found) if target.experts else found[0]
