"""What is needed and not installed is told with the command that installs it."""

import importlib.util

import pytest

from sorsa_ds.config.schema import DataConfig, RunConfig
from sorsa_ds.data.word_problems import word_problems
from sorsa_ds.evaluate.command import evaluate
from sorsa_ds.evaluate.options import Options
from sorsa_ds.model import embedded
from sorsa_ds.runtime.extras import check_extra
from sorsa_ds.train.first_checks import check_first, check_inputs
from sorsa_ds.train.options import parse

INSTALL = r'pip install "sorsa-ds\[{}\]"'


@pytest.fixture
def without(monkeypatch):
    """Hides modules from the import system, as if their packages were not installed."""

    def hide(*names):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find(name))

    return hide


def test_what_is_installed_is_no_fault():
    for module in ("wandb", "math_verify", "reasoning_gym", "gguf"):
        check_extra(module, "a test")


def test_the_default_job_names_all_that_it_lacks_at_once(without, tmp_path, monkeypatch):
    monkeypatch.setenv("SORSA_CACHE", str(tmp_path))
    without("reasoning_gym", "gguf")
    with pytest.raises(ValueError) as caught:
        check_inputs(RunConfig())
    told = str(caught.value)
    assert "model=smollm2-135m-instruct needs the package gguf, which is not installed" in told
    assert "data.path=word-problems needs the package reasoning-gym, which is not installed" in told
    assert told.count('pip install "sorsa-ds[default-job]"') == 2
    with pytest.raises(ValueError, match="needs the package gguf"):
        embedded.ensure_embedded_model(len)
    with pytest.raises(ValueError, match="needs the package reasoning-gym"):
        word_problems(0)


def test_a_run_on_other_data_lacks_nothing(without, tmp_path, project):
    without("reasoning_gym", "gguf", "wandb", "math_verify")
    check_inputs(RunConfig(model=str(project / "model"), data=DataConfig(path=str(project / "data.jsonl"))))


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_is_looked_for_before_the_run(without, tmp_path, project, mode):
    without("wandb")
    words = [f"model={project / 'model'}", f"data.path={project / 'data.jsonl'}", f"output.folder={tmp_path}"]
    invocation = parse([*words, f"output.wandb={mode}"])
    told = f"output.wandb={mode} needs the package wandb, which is not installed: " + INSTALL.format("wandb")
    with pytest.raises(ValueError, match=told):
        check_first(invocation, logs=True)


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_tasks_with_graded_answers_name_the_grader(without, task):
    without("math_verify")
    told = f"--task {task} needs the package math-verify, which is not installed: " + INSTALL.format("evaluation")
    with pytest.raises(ValueError, match=told):
        evaluate(Options("nowhere", task))
