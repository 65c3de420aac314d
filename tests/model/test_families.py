"""Families of models through the whole product: transformers' logits at step 0, two steps, both exports.

`benchmarks/families.py` does the same with every family that transformers has. These are one of each kind.
"""

import pytest

from benchmarks.helpers.family_run import examine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "whole"),
    [
        ("bloom", False),  # ALiBi, tied embeddings
        ("dbrx", False),  # writes in place into what a linear returns; calls a module once per expert
        ("falcon", False),  # has a class of linears of its own
        ("falcon_h1", False),  # attention and a state-space block side by side
        ("gemma3", False),  # a checkpoint that sees, with buffers that must not be rounded
        ("gemma4_text", False),  # layers with another head_dim
        ("gpt_oss", False),  # fused experts with biases, attention sinks
        ("llama4", True),
        ("mamba", False),  # reads the weights of linears without calling them
        ("qwen2_vl", True),
        ("recurrent_gemma", False),
        ("zamba2", False),  # blocks that several layers share
    ],
)
def test_a_family_is_trained_and_exported_as_transformers_has_it(family, whole):
    row = examine(family, whole)
    assert row.result == "pass", row
    assert row.linears and not row.silent
    assert row.share > 0.5 or "Warning" in row.said


def test_a_family_that_transformers_cannot_build_is_told_apart_from_our_own_failures():
    row = examine("gemma3n")
    assert row.result == "not built" and "timm" in row.reason


@pytest.mark.slow
def test_ranks_that_hit_different_experts_do_not_wait_for_each_other_for_ever():
    row = examine("dbrx", False, 2, 3, 100, "adapter.experts=frozen")
    assert row.result == "pass" and row.adapted_experts == 0, row
