"""Runs with `train.micro_batch_tokens`: their losses and factors are those of the same runs without it."""

import json

import pytest

from sorsa_ds.config.command_line import load_settings
from sorsa_ds.config.schema import RunConfig
from tests.helpers.projects import metrics
from tests.helpers.runs import assert_learned_the_same, passes_of_run, rewound, train
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow

SIZES = ("train.steps=10", "train.global_batch_size=16", "data.max_length=100", "output.save_every=0")
POSITIONS = 320
"""Examples are 40 to 70 tokens long."""


@pytest.mark.parametrize(("ranks", "ds"), [(2, "zero3"), (2, "zero2"), (1, "stage0")])
def test_ten_levelled_steps_learn_what_ten_others_do_in_fewer_passes(project, ranks, ds):
    ways = {"plain": "train.micro_batch_size=1", "levelled": f"train.micro_batch_tokens={POSITIONS}"}
    passes = {
        way: run_ranks(ranks, passes_of_run, project, f"levels-{ds}-{way}", ds, [*SIZES, setting])
        for way, setting in ways.items()
    }
    assert passes["plain"] == [[16 // ranks] * 10] * ranks
    assert passes["levelled"][0] == passes["levelled"][-1]
    assert all(taken <= 8 // ranks for taken in passes["levelled"][0])
    plain, levelled = (project / f"levels-{ds}-{way}" for way in ways)
    assert_learned_the_same(levelled, plain)
    kept = load_settings(RunConfig, levelled / "config.yaml").train
    assert (kept.micro_batch_tokens, kept.micro_batch_size, kept.global_batch_size) == (POSITIONS, 2, 16)
    resolved = json.loads((levelled / "ds_config.json").read_text())
    assert resolved["train_micro_batch_size_per_gpu"] * resolved["gradient_accumulation_steps"] * ranks == 16


def test_a_levelled_run_goes_on_at_other_ranks_and_without_levels(project, capfd):
    asked = ("train.micro_batch_tokens=250", "data.max_length=100")
    run, _ = train(project, "levels", *asked)
    assert ", levelled: " in (told := capfd.readouterr().out)
    assert "padding; the largest of a pass exceed the mean by " in told
    alone, plain = (rewound(project, run, name, 2) for name in ("levels-alone", "levels-plain"))
    train(project, alone.name, *asked, "--resume=auto", ranks=1)
    train(project, plain.name, "data.max_length=100", "train.micro_batch_size=1", "--resume=auto", ranks=1)
    for other, tokens in ((alone, 250), (plain, None)):
        assert_learned_the_same(other, run)
        assert load_settings(RunConfig, other / "config.yaml").train.micro_batch_tokens == tokens


def test_a_levelled_stream_learns_what_another_does(project):
    streamed = ("data.streaming=true", "data.shuffle_buffer=8", "data.eval_size=0", "data.max_length=100")
    levelled, _ = train(project, "levels-streamed", *streamed, "train.micro_batch_tokens=auto")
    plain, _ = train(project, "plain-streamed", *streamed)
    assert metrics(levelled, "loss") == pytest.approx(metrics(plain, "loss"), rel=1e-6)
    assert metrics(levelled, "grad_norm") == pytest.approx(metrics(plain, "grad_norm"), rel=1e-5)
