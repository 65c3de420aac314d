"""Runs with `train.sequence_parallel`: what N ranks compute together is what one computes alone."""

import pytest
import torch

from sorsa_ds.data.batches import collate
from sorsa_ds.data.tokenize import IGNORED
from sorsa_ds.model.sequence_parallel import SequenceParallel
from sorsa_ds.train.sequence_shards import shard
from tests.helpers.projects import metrics
from tests.helpers.runs import rewound, train, trained


TEN = ("train.steps=10", "output.save_every=0")


def same(one, other):
    """Compare what two runs have measured and learned, to rounding."""
    assert len(metrics(one, "loss")) == len(metrics(other, "loss"))
    for key in ("loss", "grad_norm", "eval_loss", "reg_loss", "reg_grad_norm"):
        assert metrics(one, key) == pytest.approx(metrics(other, key), rel=1e-5), key
    before = trained(other)
    for name, factor in trained(one).items():
        assert (before[name] - factor).norm() < 1e-5 * factor.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("ds", ["stage0", "zero2", "zero3"])
def test_ten_steps_of_two_ranks_together_are_those_of_one_rank(project, ds):
    alone, _ = train(project, f"alone-{ds}", *TEN, ds=ds, ranks=1)
    together, _ = train(project, f"together-{ds}", *TEN, "train.sequence_parallel=2", ds=ds, ranks=2)
    same(together, alone)
