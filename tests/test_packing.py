"""Packed rows (benchmarks/helpers/packing.py): their losses and gradients are those of the examples one by one."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.helpers.packing import balanced, pack, packed_loss
from sorsa_ds.data.batches import collate
from sorsa_ds.data.tokenize import IGNORED
from sorsa_ds.train.loss import summed_loss


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="sdpa")


def made_up(lengths):
    """An example of each length; the last two thirds of it are learned."""
    torch.manual_seed(0)
    examples = []
    for length in lengths:
        ids = torch.randint(3, 64, (length,), dtype=torch.int32)
        labels = torch.where(torch.arange(length) < max(1, length // 3), IGNORED, ids)
        examples.append({"input_ids": ids.numpy(), "labels": labels.numpy()})
    return examples


def test_a_packed_rows_loss_and_gradient_are_those_of_padded_ones(model):
    examples = made_up([9, 14, 2, 21])
    packed, padded = packed_loss(model, pack(examples)), summed_loss(model, collate(examples, 0))
    alone = sum(summed_loss(model, collate([example], 0)).item() for example in examples)
    assert packed.item() == pytest.approx(padded.item(), rel=1e-6)
    assert packed.item() == pytest.approx(alone, rel=1e-6)
    weights = list(model.parameters())
    ours, theirs = (torch.autograd.grad(loss, weights) for loss in (packed, padded))
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_positions_start_again_and_attention_stays_inside_an_example():
    row = pack(made_up([2, 3]))
    assert row["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert row["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1],
    ]  # fmt: skip


def test_attention_across_the_seams_is_another_loss(model):
    row = pack(made_up([9, 14, 2, 21]))
    across = {**row, "attention_mask": torch.ones_like(row["attention_mask"]).tril()}
    assert packed_loss(model, across).item() != pytest.approx(packed_loss(model, row).item(), rel=1e-3)


def test_rows_hold_every_example_once_and_are_nearly_equal():
    lengths = [50, 7, 31, 31, 12, 4, 44, 9]
    rows = balanced(lengths, 3)
    assert sorted(index for row in rows for index in row) == list(range(8))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert max(sums) - min(sums) <= min(lengths) * 2
