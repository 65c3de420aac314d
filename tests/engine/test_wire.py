"""What a step sends on ZeRO stages 0 to 2, counted: no clock, so a regression is no noise.

ZeRO-3: tests/engine/test_multinode_sharding.py. Flops, and what a layer keeps for backward: tests/sorsa/test_layer.py.
"""

import pytest
import torch

from benchmarks.helpers.wire import Wire
from tests.helpers.engines import CASES, MICRO, RANK, build, ds_config, micro_losses, sequences
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow


WORLD, CASE = 2, CASES[1]
GRAMS = 8 * 28 * RANK**2
"""Bytes of the Gram matrices of U and V of 14 linears, in fp64."""
CUT_ROWS = 8 * RANK
"""Bytes of the one row that lies on two ranks, half of it on each, in fp64; the whole row enters the Gram matrix."""


def sent(folder, stage):
    """What this rank takes part in during a second step, (kind, bytes) each; bytes of all trained numbers in fp32."""
    engine = build(folder, ds_config(stage, "", 1.0, CASE["accumulation"]), CASE)
    for number in range(2):
        batch = sequences(MICRO * WORLD * CASE["accumulation"], seed=number)
        with Wire() as wire:
            engine.train_step(micro_losses(engine, batch, CASE["accumulation"]))
    trained = sum(p.numel() * p.itemsize for p in engine.module.parameters() if p.requires_grad)
    engine.destroy()
    assert torch.distributed.get_world_size() == WORLD
    return [(one.kind, one.nbytes) for one in wire.seen], trained


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_sends_gradients_gram_matrices_and_what_was_updated(tiny_llama, stage):
    for wire, trained in run_ranks(WORLD, sent, tiny_llama, stage):
        gradients = [("allreduce_", trained)] * (CASE["accumulation"] if stage == 2 else 1)
        updated = -(-trained // 16) * 16  # filled up to blocks of DeepSpeed's alignment
        rest = [("allreduce_", GRAMS + CUT_ROWS), ("allreduce_", 4), ("_allgather_base_", updated)]  # 4: its norm
        assert wire == gradients + (rest if stage else [])
