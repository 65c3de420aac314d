"""The command, on runs as the trainer leaves them and on real models."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from sorsa_ds import load_adapter
from sorsa_ds.export.command import Options, export
from tests.helpers.distances import relative
from tests.helpers.exported import logits, plainly
from tests.helpers.finished import finished_run
from tests.helpers.forked import launch_forked, outcome_forked

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shard"), [("embedded", "30MB"), ("stories260k", "300KB")])
def test_a_real_model(name, shard, request, tmp_path):
    if name == "embedded":
        base = request.getfixturevalue("small_real_model")
    else:
        base = request.getfixturevalue("shared_data") / "models" / name
    run = finished_run(base, tmp_path / "run", rank=8)
    theirs = logits(load_adapter(run / "adapter"))
    merged = export(Options(run, "merged", tmp_path / "merged", max_shard_size=shard))
    assert relative(logits(plainly(merged, dtype=torch.float32)), theirs) < 1e-5
    assert AutoTokenizer.from_pretrained(merged)("Once upon")["input_ids"]
    lora = export(Options(run, "lora", tmp_path / "lora"))
    assert relative(logits(PeftModel.from_pretrained(plainly(base, dtype=torch.float32), lora)), theirs) < 1e-4


@pytest.mark.slow
def test_the_command(runs, tmp_path):
    command = ["launch/export.py", "--run", runs("llama"), "--output", tmp_path / "out"]
    done = outcome_forked(tmp_path, *command, "--format", "lora", "--rank", "4")
    assert done.returncode == 0, done.stderr
    assert "--max-lora-rank 8 " in done.stdout
    assert "Cut to rank 4: relative error" in done.stdout
    done = outcome_forked(tmp_path, *command, "--format", "merged")
    assert done.returncode == 2
    assert "is not an empty folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_as_the_trainer_leaves_it(project, tmp_path):
    _, run, _ = launch_forked(project, "exported", ranks=1, ds="stage0")
    theirs = logits(load_adapter(run / "adapter"))
    base = plainly(project / "model")
    assert relative(logits(base), theirs) > 1e-4
    assert relative(logits(plainly(export(Options(run, "merged", tmp_path / "merged")))), theirs) < 1e-5
    lora = export(Options(run, "lora", tmp_path / "lora"))
    assert relative(logits(PeftModel.from_pretrained(base, lora)), theirs) < 1e-5
    held_out = json.loads((run / "report.json").read_text())["eval_loss_end"]
    assert f"| held-out loss after | {held_out:.4g} |" in (lora / "README.md").read_text()
