"""What earlier versions have written still goes on: a run is resumed, exported and loaded.

tests/fixtures/run_of_0.1.0 was trained by version 0.1.0 on tests/golden/model and the generated word problems, on two
ranks under ZeRO-3; of its checkpoints the one of step 3 is kept.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import sorsa_ds
from sorsa_ds.model.adapter_file import TRAINED
from tests.helpers.forked import run_forked
from tests.helpers.projects import ROOT, metrics

pytestmark = pytest.mark.slow

MODEL = ROOT / "tests" / "golden" / "model"
RUN = ROOT / "tests" / "fixtures" / "run_of_0.1.0"


@pytest.fixture
def run(tmp_path):
    """A copy to work in."""
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def command(run: Path, *words, ranks=1) -> str:
    """Run a command of launch/; returns what it printed."""
    return run_forked(run.parent, [str(word) for word in words], ranks=ranks)[0]


def test_its_checkpoint_is_resumed(run):
    printed = command(
        run, "launch/train.py", "--resume", run / "checkpoints" / "step-000003", f"model={MODEL}",
        f"output.folder={run.parent}", ranks=2,
    )  # fmt: skip
    assert printed.count("sorsa.rank is called adapter.rank now") == 1
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert (kept["adapter"]["rank"], kept["sorsa"].keys() & {"rank", "targets"}) == (4, set())
    assert metrics(run, "loss") == pytest.approx(metrics(RUN, "loss"), rel=1e-5)
    theirs = load_file(RUN / "adapter" / "adapter_model.safetensors")
    for name, ours in load_file(run / "adapter" / TRAINED).items():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-4, atol=1e-5)
    check_peft_loads(run / "adapter")


def check_peft_loads(adapter: Path) -> None:
    """The names that version 0.1.0 gave its own files are PEFT's now, and hold what PEFT takes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 43)[None]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), adapter).eval()
    with torch.no_grad():
        theirs = sorsa_ds.load_adapter(adapter, base=str(MODEL))(ids).logits
        torch.testing.assert_close(model(ids).logits, theirs, rtol=1e-4, atol=1e-4)


def test_its_adapter_is_loaded_and_its_export_computes_the_same(run, tmp_path):
    from transformers import AutoModelForCausalLM

    exported = tmp_path / "merged"
    command(run, "launch/export.py", "--run", run, "--format", "merged", "--base", MODEL, "--output", exported)
    merged = AutoModelForCausalLM.from_pretrained(exported)
    loaded = sorsa_ds.load_adapter(run / "adapter", base=str(MODEL))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(MODEL)(ids).logits
    assert (merged(ids).logits - base).abs().max() > 1e-3, "training has changed nothing"


def test_its_held_out_loss_is_measured_anew(run):
    config = (run / "config.yaml").read_text().splitlines()
    assert config[0].startswith("model: ")
    (run / "config.yaml").write_text("\n".join([f"model: {MODEL}", *config[1:]]) + "\n")
    description = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({**description, "base_model": str(MODEL)}))
    printed = command(run, "launch/evaluate.py", "--model", run, "--task", "loss")
    told = float(printed.split("held-out loss")[1].split()[0])
    assert told == pytest.approx(metrics(RUN, "eval_loss")[-1], rel=1e-4)
