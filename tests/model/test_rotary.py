"""Rotary frequencies that follow the length of a call: where they are, and against what transformers computes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from sorsa_ds.model.rotary import rotary_rows, steady_length
from tests.helpers.architectures import CONFIGS, DECODER, LONGROPE


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
    assert steady_length(LONGROPE) == 12
    assert move(LONGROPE, 12) < 1e-5
    assert move(LONGROPE, 13) > 1e-3
    assert rotary_rows(LONGROPE, 12) == []
    ((name, told),) = rotary_rows(LONGROPE, 13)
    assert name == "rotary positions"
    assert "more than 12 positions" in told


@pytest.mark.parametrize(
    "config",
    [
        CONFIGS["llama"],
        LlamaConfig(**DECODER, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        Gemma3TextConfig(**DECODER, head_dim=8),
    ],
    ids=["plain", "linear", "gemma3"],
)
def test_other_frequencies_are_always_the_same(config):
    assert steady_length(config) is None
    assert rotary_rows(config, 10**6) == []
    assert move(config, 40) < 1e-5
