"""The real commands, as a user types them: DeepSpeed's launcher, two ranks, real files."""

import json
import math
import os
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file

from sorsa_ds.model.adapter_file import TRAINED
from tests.helpers.forked import launch_forked
from tests.helpers.projects import ROOT, STEPS, launch, metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def zero3(project):
    """The run that most tests look at."""
    return launch(project, "zero3", "train.eval_every=3", "output.save_every=4")


def test_a_run_leaves_what_it_promises(zero3):
    printed, folder, _ = zero3
    for told in ("Precision fp32", "--- masked", "--- learned", "decomposing", "Loss at step 0", "held-out loss",
                 "training loss", "evaluate it"):  # fmt: skip
        assert told in printed, told
    assert len(metrics(folder, "loss")) == STEPS
    assert len(metrics(folder, "eval_loss")) == 3  # at 0, 3 and 6
    assert metrics(folder, "loss")[-1] < metrics(folder, "loss")[0]
    for key in ("learning_rate", "grad_norm", "reg_loss", "reg_grad_norm", "tokens_per_second", "memory_gib"):
        assert all(math.isfinite(value) for value in metrics(folder, key)), key
    report = json.loads((folder / "report.json").read_text())
    assert report["start_loss"] == pytest.approx(report["base_loss"], rel=1e-5)
    for kind, counts in report["data"].items():
        assert counts["rows"] == counts["learned_rows"] + sum(counts["left_out"].values()), kind
        assert 0 < counts["learned_tokens"] < counts["tokens"], kind
        assert f"{kind} rows" in printed
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["train"]["micro_batch_size"] == 2
    assert config["train"]["gradient_accumulation_steps"] == 2
    factors = load_file(folder / "adapter" / TRAINED)
    assert sum(t.numel() for t in factors.values()) == report["trainable_parameters"]
    layers = json.loads((folder / "init.json").read_text())["layers"]
    assert [layer["rank"] for layer in layers] == [4] * 14
    assert {layer["owner"] for layer in layers} == {0, 1}
    assert (folder / "loss.png").stat().st_size > 1000
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "latest", "best", "step-000004", "step-000006",
    }  # fmt: skip
    assert not list(folder.rglob("*.tmp"))


def test_a_second_command_reproduces_the_held_out_loss(zero3):
    _, folder, _ = zero3
    done = subprocess.run(
        [sys.executable, "launch/evaluate.py", "--model", str(folder), "--task", "loss"], cwd=ROOT, text=True,
        capture_output=True, check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    told = float(done.stdout.split("held-out loss")[1].split()[0])
    assert told == pytest.approx(metrics(folder, "eval_loss")[-1], rel=1e-5)
    results = json.loads((folder / "evaluation" / "held-out-loss" / "results.json").read_text())
    assert results["nats_per_token"] == pytest.approx(results["reported"], rel=1e-5)


def test_the_same_name_again_is_refused_and_nothing_is_overwritten(project, zero3):
    _, folder, _ = zero3
    before = (folder / "metrics.jsonl").read_bytes()
    printed, _, _ = launch_forked(project, "zero3", code=2)
    assert "holds a run already" in printed
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("ds", "ranks"), [("stage0", 1), ("zero1", 2), ("zero2", 2), ("zero3_offload", 2), ("zero3", 1)]
)
def test_every_configuration_trains_the_same_numbers(project, zero3, ds, ranks):
    _, reference, _ = zero3
    _, folder, _ = launch_forked(project, f"{ds}-{ranks}", ds=ds, ranks=ranks)
    assert metrics(folder, "loss") == pytest.approx(metrics(reference, "loss"), rel=1e-5)
    assert metrics(folder, "grad_norm") == pytest.approx(metrics(reference, "grad_norm"), rel=1e-4)
    assert metrics(folder, "reg_loss") == pytest.approx(metrics(reference, "reg_loss"), rel=1e-4, abs=1e-8)
    assert metrics(folder, "eval_loss")[-1] == pytest.approx(metrics(reference, "eval_loss")[-1], rel=1e-5)


def test_mixed_precision_and_checkpointing_train(project, zero3):
    _, reference, _ = zero3
    _, folder, _ = launch_forked(project, "mixed", "train.precision=mixed", "train.gradient_checkpointing=true")
    assert metrics(folder, "loss") == pytest.approx(metrics(reference, "loss"), rel=0.02)


def test_wandb_offline(project):
    _, folder, _ = launch_forked(project, "wandb", "output.wandb=offline", ranks=1, ds="stage0", WANDB_SILENT="true")
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter.targets=[qproj]"], "'qproj' matches no linear of this model. Did you mean 'q_proj'"),
        (["sorsa.rnk=4"], "did you mean adapter.rank"),
        (["train.global_batch_size=7"], "train.global_batch_size"),
        (["data.max_length=512", "data.path=PROJECT/long.jsonl"], "the model takes 256; lower it"),
        (["output.folder=/proc/nowhere"], "/proc/nowhere"),
        (["data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["train.learning_rate=1e9", "train.max_start_gap=1e9"], "the loss is nan at step 2"),
    ],
)
def test_mistakes_end_with_one_message_and_soon(project, arguments, message):
    arguments = [argument.replace("PROJECT", str(project)) for argument in arguments]
    command = launch if "q_proj" in message else launch_forked  # one goes the whole way
    printed, _, seconds = command(project, f"bad-{len(message)}", *arguments, code=2)
    assert printed.count(message) >= 1, printed[-3000:]
    assert printed.count("\nerror:") == 1
    assert "Traceback" not in printed
    assert seconds < 90


def test_an_error_on_one_rank_ends_all_with_its_message_first(project, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import sorsa_ds.train.trainer as t\n"
        "    whole = t.Trainer.step\n"
        "    def step(self, n):\n"
        "        if n == 2: raise RuntimeError('the disk of rank 1 caught fire')\n"
        "        return whole(self, n)\n"
        "    t.Trainer.step = step\n"
    )
    printed, _, seconds = launch(project, "fire", code=1, PYTHONPATH=str(tmp_path))
    assert "[rank 1] RuntimeError: the disk of rank 1 caught fire" in printed
    assert "[rank 0]" not in printed.split("caught fire")[0]
    assert seconds < 90


def test_command_lines_are_read_without_pytorch():
    """It takes seconds to import, and a mistake or a call for help is answered at once."""
    rooms = "train", "plan", "preview", "evaluate", "export", "study.analysis"
    code = f"import sys, {', '.join(f'sorsa_ds.{room}.options' for room in rooms)}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True).stdout == "False\n"
