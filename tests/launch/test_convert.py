"""The command `convert`: settings to stdout or into a file, what is left out to stderr, mistakes in a line."""

import subprocess
import sys

import pytest
import yaml

from sorsa_ds.cli.convert import _convert
from sorsa_ds.train.options import parse
from tests.helpers.projects import ROOT

AXOLOTL = """
base_model: a/b
adapter: lora
lora_r: 8
datasets: [{path: c/d, type: chat_template}]
learning_rate: 1e-4
logging_steps: 1
micro_batch_size: 2
gradient_accumulation_steps: 4
"""


@pytest.fixture
def file(tmp_path):
    """A small file of axolotl's."""
    path = tmp_path / "theirs.yaml"
    path.write_text(AXOLOTL)
    return path


def test_stdout_has_the_settings_and_stderr_what_is_left_out(file, tmp_path, capsys):
    _convert([str(file)])
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["adapter"] == {"rank": 8}
    assert "Not carried over: logging_steps (every step is logged" in printed.err
    assert "# Not carried over: logging_steps" in printed.out
    written = tmp_path / "ours.yaml"
    _convert(["--output", str(written), str(file), "--gpus=3"])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"Written to {written}: sorsa train --config {written}" in printed.err
    config = parse(["--config", str(written)]).config
    assert (config.model, config.train.global_batch_size, config.data.format) == ("a/b", 2 * 4 * 3, "chat")
    with pytest.raises(ValueError, match=r"--output .*ours\.yaml: there is such a file already; name another one"):
        _convert([str(file), f"--output={written}"])
    assert capsys.readouterr().err == "", "notes would bury the message"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one file is expected, and there are 0"),
        (["FILE", "FILE"], "one file is expected, and there are 2"),
        (["FILE", "--gpu", "3"], "convert has no option gpu; there are --output, --gpus"),
        (["FILE", "--gpus", "0"], "--gpus 0: must be a whole number from 1"),
        (["FILE", "--without", "lora_q"], "--without lora_q: .* has no such key"),
        (["FILE", "--method", "loraa"], "method = 'loraa': must be sorsa"),
        (["FILE", "--method", "full"], r"method full has no use for adapter.rank=8 \(lora_r\): take another --method"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_are_told(file, words, message):
    with pytest.raises(ValueError, match=message):
        _convert([str(file) if word == "FILE" else word for word in words])


def test_a_4_bit_base_does_not_become_lora(file):
    file.write_text(f"{AXOLOTL}load_in_4bit: true\n")
    with pytest.raises(ValueError, match=r"method lora has no use for residual.storage=nf4 \(load_in_4bit\)"):
        _convert([str(file), "--method=lora"])


@pytest.mark.slow
def test_the_script_ends_with_2_where_a_file_is_refused(file):
    file.write_text(f"{AXOLOTL}rl: dpo\n")
    done = subprocess.run(
        [sys.executable, "launch/convert.py", str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "rl: preference training" in done.stderr
    assert "Traceback" not in done.stderr
