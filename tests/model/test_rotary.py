"""Rotary frequencies that follow the length of a call: where they are, and against what transformers computes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config

from sorsa_ds.model.rotary import rotary_rows, steady_length

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.2,
)  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
BY_LENGTH = Phi3Config(**SMALL, rope_parameters=LONGROPE, original_max_position_embeddings=12)


def move(config, longest):
    """How far the logits of a short sequence move when one of so many tokens is computed with it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 60, (2, longest))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits[0, :8]
        alone = model(input_ids=ids[:1, :8]).logits[0]
    return (together - alone).abs().max().item()


def test_beyond_the_steady_length_a_short_sequence_depends_on_a_long_one():
    assert steady_length(BY_LENGTH) == 12
    assert move(BY_LENGTH, 12) < 1e-5
    assert move(BY_LENGTH, 13) > 1e-3
    assert rotary_rows(BY_LENGTH, 12) == []
    ((name, told),) = rotary_rows(BY_LENGTH, 13)
    assert name == "rotary positions"
    assert "more than 12 positions" in told


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        Gemma3TextConfig(**SMALL, head_dim=8),
    ],
    ids=["plain", "linear", "gemma3"],
)
def test_other_frequencies_are_always_the_same(config):
    assert steady_length(config) is None
    assert rotary_rows(config, 10**6) == []
    assert move(config, 40) < 1e-5
