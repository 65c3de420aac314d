"""The held-out loss of each source and of all, by hand."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import IGNORED
from sorsa_ds.model.sequence_parallel import SequenceParallel
from sorsa_ds.train.held_out import held_out_losses
from sorsa_ds.train.loss import LossOptions
from tests.helpers.architectures import CONFIGS


def examples(seed: int, count: int) -> list[dict]:
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = generator.integers(3, 64, generator.integers(4, 12)).astype(np.int32)
        masked = np.arange(len(ids)) < generator.integers(0, 3)
        made.append({"input_ids": ids, "labels": np.where(masked, np.int32(IGNORED), ids)})
    return made


def by_hand(model, some) -> tuple[float, int]:
    """Sum of -log p over the learned tokens, one example at a time, and their number."""
    nats, learned = 0.0, 0
    for one in some:
        ids, labels = torch.as_tensor(one["input_ids"]).long(), one["labels"]
        log_p = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for position in range(1, len(ids)):
            if labels[position] != IGNORED:
                nats -= log_p[position - 1, ids[position]].item()
                learned += 1
    return nats, learned


@torch.no_grad()
def test_each_source_has_its_own_mean_and_all_have_that_over_all_tokens():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    parts = {"a": examples(1, 5), "b": examples(2, 3)}
    stored = {name: Examples.of(some) for name, some in parts.items()}
    loss, losses = held_out_losses(model, stored, 2, 0, torch.device("cpu"), iter, LossOptions(), SequenceParallel())
    sums = {name: by_hand(model, some) for name, some in parts.items()}
    assert losses == {name: pytest.approx(nats / learned, rel=1e-5) for name, (nats, learned) in sums.items()}
    assert loss == pytest.approx(sum(nats for nats, _ in sums.values()) / sum(n for _, n in sums.values()), rel=1e-5)
    alone = held_out_losses(
        model, {"a": stored["a"]}, 2, 0, torch.device("cpu"), iter, LossOptions(), SequenceParallel()
    )
    assert alone == (losses["a"], {})
