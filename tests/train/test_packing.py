"""Runs with `data.packing`: their losses and factors are those of the same runs without it."""

import pytest
import torch
from torch import nn

from tests.helpers.projects import metrics
from tests.helpers.runs import train, train_rank, trained
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow

SIZES = ("train.steps=4", "train.global_batch_size=16", "train.micro_batch_size=2", "data.max_length=1024")
"""Examples are about 200 tokens long, so a row holds some five; a step has four passes of a rank unpacked, one packed."""


def counted(project, name, ds, arguments):
    """Forward passes of this rank in training mode, in a whole run."""
    passes = [0]
    forward = nn.Module.__call__

    def counting(self, *inputs, **named):
        passes[0] += type(self).__name__ == "SorsaEngine" and self.training
        return forward(self, *inputs, **named)

    nn.Module.__call__ = counting
    train_rank(project, name, ds, arguments, None)
    return passes[0]


@pytest.mark.parametrize(("ranks", "ds"), [(2, "zero3"), (1, "stage0")])
def test_a_packed_run_learns_what_the_unpacked_one_does_in_fewer_passes(project, ranks, ds):
    passes = {}
    for way in ("false", "true"):
        arguments = ["output.save_every=2", *SIZES, f"data.packing={way}"]
        passes[way] = run_ranks(ranks, counted, project, f"{ds}-{way}", ds, arguments)
    print(passes)
    unpacked, packed = (project / f"{ds}-{way}" for way in passes)
    for key in ("loss", "grad_norm", "eval_loss"):
        print(key, *[metrics(run, key) for run in (unpacked, packed)])
        assert metrics(packed, key) == pytest.approx(metrics(unpacked, key), rel=1e-5)
    for name, factor in trained(unpacked).items():
        gap = (trained(packed)[name] - factor).norm() / factor.norm()
        assert gap < 1e-4, name
