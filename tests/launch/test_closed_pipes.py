"""Every command, when nobody reads what it prints: no traceback, and its work is done."""

import os
import subprocess
import sys

import pytest

from tests.helpers.projects import ROOT, STEPS, environment_of, metrics, words_of

pytestmark = pytest.mark.slow


@pytest.fixture
def unread():
    """The writing end of a pipe that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    yield writes
    os.close(writes)


@pytest.mark.parametrize(
    "words",
    [
        ["train.py", "--help"], ["evaluate.py", "--help"], ["export.py", "--help"], ["analyze.py", "--help"],
        ["compare.py", "--help"], ["plan.py", "--help"], ["check.py", "evaluate", "--help"],
        ["plan.py", "--ds_config", "ds_configs/stage0.json", "model=meta-llama/Llama-2-7b-hf"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_a_command_prints_may_go_unread(words, unread, project):
    command = [sys.executable, f"launch/{words[0]}", *words[1:]]
    environment = environment_of(project, PYTHONUNBUFFERED="")  # so that the last lines are written when it leaves
    done = subprocess.run(
        command, stdout=unread, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0
    assert not any(word in done.stderr for word in ("Traceback", "BrokenPipe", "Broken pipe", "Exception")), done.stderr


def test_training_goes_on_when_nobody_reads(project, unread):
    command = [sys.executable, *words_of(project, "unread", ds="stage0")]
    done = subprocess.run(command, stdout=unread, stderr=unread, check=False, cwd=ROOT, env=environment_of(project))
    assert done.returncode == 0
    assert len(metrics(project / "unread", "loss")) == STEPS
    assert (project / "unread" / "report.json").exists()
