"""Runs with `data.packing`: their losses and factors are those of the same runs without it."""

import pytest
from transformers import AutoTokenizer

from tests.helpers.architectures import save
from tests.helpers.forked import launch_forked
from tests.helpers.projects import metrics
from tests.helpers.runs import assert_learned_the_same, passes_of_run, rewound
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow

SIZES = (
    "train.steps=4", "train.global_batch_size=16", "train.micro_batch_size=1", "data.max_length=256",
    "train.label_smoothing=0.1",
)  # fmt: skip
"""Examples are about 55 tokens long, so a row holds four of them."""


@pytest.mark.parametrize(("ranks", "ds"), [(2, "zero3"), (2, "zero2"), (1, "stage0")])
def test_a_packed_run_learns_what_the_unpacked_one_does_in_fewer_passes(project, ranks, ds):
    passes = {
        way: run_ranks(ranks, passes_of_run, project, f"{ds}-{way}", ds, [*SIZES, f"data.packing={way}"])
        for way in ("false", "true")
    }
    assert passes["false"] == [[16 // ranks] * 4] * ranks
    assert passes["true"][0] == passes["true"][-1]
    assert all(taken <= 5 // ranks + 1 for taken in passes["true"][0])
    unpacked, packed = (project / f"{ds}-{way}" for way in passes)
    assert_learned_the_same(packed, unpacked)


def test_examples_that_do_not_stay_apart_stop_the_run_at_its_start(project, monkeypatch):
    monkeypatch.setattr("sorsa_ds.train.padding.packed_attention", lambda model, positions: {
        "position_ids": positions.new_tensor(range(positions.shape[1])).expand_as(positions),
    })  # fmt: skip
    told, run, _ = launch_forked(project, "leaking", *SIZES, "data.packing=true", code=1)
    assert "data.packing: the loss of a packed micro-batch is " in told
    assert "LlamaForCausalLM and this attention kernel the examples of a row do not stay apart" in told
    assert not (run / "metrics.jsonl").exists() or metrics(run, "loss") == []


def test_a_packed_run_can_go_on_without_packing(project):
    arguments = [*SIZES, "output.save_every=2", "output.keep_checkpoints=9"]
    launch_forked(project, "whole", *arguments, "data.packing=true", ds="stage0", ranks=1)
    run = rewound(project, project / "whole", "again", 2)
    launch_forked(project, "again", *arguments, "data.packing=false", "--resume=auto", ds="stage0", ranks=1)
    assert metrics(run, "loss") == pytest.approx(metrics(project / "whole", "loss"), rel=1e-6)
    assert len(metrics(run, "loss")) == 4


def test_a_model_that_cannot_keep_examples_apart_is_refused_before_the_data_is_read(project, tmp_path):
    folder = save("rwkv", tmp_path / "rwkv")
    AutoTokenizer.from_pretrained(project / "model").save_pretrained(folder)
    arguments = [f"model={folder}", "data.packing=true", "train.check_memory=false"]
    told, _, _ = launch_forked(project, "rwkv", *arguments, ranks=1, ds="stage0", code=2)
    assert "data.packing: RwkvForCausalLM carries a state from token to token" in told
    assert "masked" not in told  # the first example is shown once the data is there
    assert "Traceback" not in told
