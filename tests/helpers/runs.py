"""Short runs in forked ranks, stopped and rewound."""

import os
import shutil
import signal
import time

import pytest
from safetensors.torch import load_file

from sorsa_ds.model.adapter_file import TRAINED
from sorsa_ds.run.checkpoint import folder as folders
from sorsa_ds.train.options import parse
from tests.helpers.projects import ROOT, metrics, settings
from tests.helpers.worlds import run_ranks

GLOBAL = "train.global_batch_size=6"

EPSILON = "train.adam_epsilon=1e-5"
"""Far above the rounding of a gradient. Adam's first step is g / (|g| + epsilon): where an entry's gradient happens to
be as small as the default of 1e-8, its rounding becomes some hundredths of a whole step."""


def train_rank(project, name, ds, arguments, stop_at):
    """One rank of a run; if `stop_at` is given, the last rank alone gets SIGUSR1 in that step's first micro-batch."""
    from sorsa_ds.runtime import collectives
    from sorsa_ds.runtime.errors import Preempted
    from sorsa_ds.train.setup import assemble

    arguments = [*settings(project, name), EPSILON, *arguments, f"--ds_config={ROOT}/ds_configs/{ds}.json"]
    trainer = assemble(parse(arguments))
    if stop_at is not None:
        step = trainer.step

        def interrupted(number):
            if number == stop_at and collectives.rank() == collectives.world_size() - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
                latest = time.monotonic() + 60
                while not trainer.signals._received:  # a thread notes it, and a busy machine may let that wait
                    assert time.monotonic() < latest, "the signal was not noted"
                    time.sleep(0.001)
            return step(number)

        type(trainer).step = lambda self, number: interrupted(number)
    try:
        trainer.train()
    except Preempted as stop:
        return str(stop)
    return None


def passes_of_run(project, name, ds, arguments):
    """Make a run on this rank; returns the number of forward passes in each of its steps."""
    from sorsa_ds.engine.engine import SorsaEngine

    passes: list[int] = []
    step = SorsaEngine.train_step

    def counting(self, losses, expected, summed):
        passes.append(expected)
        return step(self, losses, expected, summed)

    SorsaEngine.train_step = counting  # in this rank's process alone
    train_rank(project, name, ds, arguments, None)
    return passes


def train(project, name, *arguments, ranks=2, ds="zero3", stop_at=None):
    """A run in forked ranks; returns its folder and what the stopped run said."""
    arguments = ["train.steps=6", "output.save_every=2", "output.keep_checkpoints=9", GLOBAL, *arguments]
    said = run_ranks(ranks, train_rank, project, name, ds, arguments, stop_at)[0]
    return project / name, said


def trained(run):
    """The trained factors of a finished run."""
    return load_file(run / "adapter" / TRAINED)


DIGITS = {"grad_norm": 1e-5, "eval_loss": 1e-5, "reg_loss": 1e-4, "reg_grad_norm": 1e-5}
"""The regulariser's value is what is left when 1 is taken from numbers near 1, so it has fewer digits."""


def assert_learned_the_same(one, other, loss=1e-6):
    """What two runs have measured and learned is the same to rounding: the losses to `loss` of themselves."""
    assert metrics(other, "loss")
    for key, digits in {"loss": loss, **DIGITS}.items():
        assert metrics(one, key) == pytest.approx(metrics(other, key), rel=digits), key
    before = trained(other)
    for name, factor in trained(one).items():
        assert (before[name] - factor).norm() < 1e-5 * factor.norm(), name


def rewound(project, run, name, step):
    """A copy of a finished run as it was when it had saved `step`."""
    copy = project / name
    shutil.copytree(run, copy)
    (copy / "report.json").unlink()
    (copy / "adapter" / TRAINED).unlink()
    for path in folders.existing_checkpoints(copy):
        if folders.step_of(path) > step:
            shutil.rmtree(path)
    (copy / "checkpoints" / "latest").write_text(f"step-{step:06d}\n")
    return copy
