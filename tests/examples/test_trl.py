"""The examples of TRL's trainers: each runs, trains SORSA's factors with the regulariser, and leaves an adapter."""

import importlib
import json
import math
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from tests.helpers.embedded_model import first_layers
from tests.helpers.projects import ROOT
from tests.helpers.worlds import FORK

pytestmark = pytest.mark.slow

COMMON = {"example", "steps", "loss_first", "loss_last", "l_reg", "trained_parameters", "adapter"}
EXAMPLES = {
    "trl_sft": (4, set()),
    "trl_dpo": (4, {"margin_first", "margin_last"}),
    "trl_grpo": (3, {"reward_first", "reward_last"}),
}
"""Example -> its steps with --tiny, and what its last line has beside the common entries."""


@pytest.fixture(scope="module")
def small(embedded_model, tmp_path_factory):
    """The embedded model's first two layers."""
    return first_layers(embedded_model, tmp_path_factory.mktemp("small"))


def run_here(name: str, small: Path, output: Path, printed: Path) -> None:
    """In a process of its own: the example as `python examples/NAME.py --tiny` runs it, on a smaller model."""
    torch.set_num_threads(1)
    example = importlib.import_module(f"examples.{name}")
    example.ensure_embedded_model = lambda: small
    # Two layers write nothing that earns a reward, and equal rewards teach nothing.
    example.reward = lambda completions, **_: [float(number) for number, _ in enumerate(completions)]
    sys.argv = [name, "--tiny", "--output", str(output)]
    with printed.open("w") as file, redirect_stdout(file):
        example.main()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_and_leaves_an_adapter(small, tmp_path, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from sorsa_ds.peft import SorsaLayer

    importlib.import_module(f"examples.{name}")  # before the fork, which is then quick
    process = FORK.Process(target=run_here, args=(name, small, tmp_path / "adapter", tmp_path / "printed"))
    process.start()
    process.join(timeout=200)
    process.kill()
    assert process.exitcode == 0
    done = json.loads((tmp_path / "printed").read_text().splitlines()[-1])
    steps, more = EXAMPLES[name]
    assert done.keys() == COMMON | more
    assert (done["example"], done["steps"]) == (name, steps)
    assert done["l_reg"] > 1e-4  # before the first step it is rounding
    assert all(math.isfinite(value) for value in done.values() if isinstance(value, float))
    if name == "trl_dpo":  # the reference is the same model: a margin of 0
        assert done["loss_first"] == pytest.approx(math.log(2), abs=1e-5)
        assert abs(done["margin_first"]) < 1e-4 < abs(done["margin_last"])

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small), tmp_path / "adapter")
    layers = [layer for layer in model.modules() if isinstance(layer, SorsaLayer)]
    assert sum(p.numel() for layer in layers for p in layer.sorsa_factors.parameters()) == done["trained_parameters"]
    for layer in layers:
        now, begun = layer.sorsa_factors["default"], layer.sorsa_initial["default"]
        assert all(not torch.equal(getattr(now, leaf), getattr(begun, leaf)) for leaf in ("U", "s", "V"))


def test_an_example_runs_by_itself_on_the_embedded_model(embedded_model, tmp_path):
    """As a user runs it, from anywhere."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "trl_dpo.py", "--tiny", "--output", tmp_path / "adapter"], cwd=tmp_path,
        text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", EXAMPLES)
def test_without_a_model_an_example_says_what_it_needs(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"examples.{name}").main()
    assert "give --model and --data, or --tiny" in capsys.readouterr().err


def test_a_completions_reward_is_its_answer_and_its_digits():
    from examples.trl_grpo import reward

    assert reward(["It is 12", "12 or 7", "none"], answer=["12", "12", "12"]) == [1 + 2 / 8, 3 / 7, 0]
