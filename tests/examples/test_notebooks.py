"""The notebooks in examples/ run from their first cell to their last, and show what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.projects import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def code_of(notebook: Path) -> str:
    """The cells with code, as one program."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def run(program: str, folder: Path) -> str:
    """What a program prints that runs in a folder, with the commands of this environment and without the hub."""
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, text=True, capture_output=True, check=False, env=environment,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(notebook):
    read = json.loads(notebook.read_text(encoding="utf-8"))
    assert read["nbformat"] == 4 and len({cell["id"] for cell in read["cells"]}) == len(read["cells"])
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in read["cells"])


@pytest.mark.slow
def test_train_look_and_export(tmp_path, small_real_model):
    """With two of the default model's layers instead of all thirty."""
    program = code_of(ROOT / "examples" / "train_look_export.ipynb")
    shorter = program.replace('MODEL = "smollm2-135m-instruct"', f"MODEL = {str(small_real_model)!r}")
    assert shorter != program
    printed = run(shorter, tmp_path)
    begin, end = (float(word) for word in printed.split("loss: ")[1].split(" nats")[0].split(" -> "))
    assert end < begin / 2
    assert "model.layers.0.self_attn.q_proj" in printed and "||U^T U - I||" in printed
    assert "LORA of rank 32 over" in printed
    assert "[base]" in printed and "[tuned]" in printed


@pytest.mark.slow
def test_preferences_with_trl(tmp_path, small_real_model):
    """With two layers and a few steps."""
    program = code_of(ROOT / "examples" / "trl_preferences.ipynb")
    shorter = program.replace("MODEL = str(ensure_embedded_model())", f"MODEL = {str(small_real_model)!r}")
    assert shorter != program
    quicker = shorter.replace("STEPS = 12", "STEPS = 6")
    assert quicker != shorter
    printed = run(quicker, tmp_path)
    begin, end = (float(word) for word in printed.split("answers: ")[1].splitlines()[0].split(" -> "))
    assert begin == 0 and end > 0.1, printed
    assert "tuned:" in printed and "base:" in printed
    assert (tmp_path / "preferences" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "preferences-for-sorsa" / "sorsa_config.json").is_file()
