"""An evaluation that was interrupted at any moment goes on, at any number of ranks; another one is refused."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from sorsa_ds.evaluate.records import read_samples
from tests.helpers.evaluated import asked, run
from tests.helpers.forked import outcome_forked
from tests.helpers.projects import ROOT
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(trained):
    """An evaluation without an interruption."""
    return run_ranks(1, run, asked(trained, "whole"))[0]


def _interrupted(trained, name, kept, half):
    """An evaluation that stopped after `kept` samples; three ranks' files hold them, and the last file's end is cut."""
    folder = trained / name
    shutil.copytree(trained / "whole", folder)
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    for file in ("samples.jsonl", "results.json"):
        (folder / file).unlink()
    for place, line in enumerate(lines[:kept]):
        with (folder / f"samples-{place % 3}.jsonl").open("a") as file:
            file.write(line)
    with (folder / "samples-2.jsonl").open("ab") as file:
        file.write(lines[kept].encode()[:half])
    return folder


@pytest.mark.parametrize(("ranks", "kept", "half"), [(1, 5, 20), (2, 0, 1), (3, 7, 60), (2, 10, 0)])
def test_what_was_done_is_kept_and_the_rest_made(trained, whole, ranks, kept, half):
    name = f"cut-{ranks}-{kept}"
    _interrupted(trained, name, kept, half)
    results, samples = run_ranks(ranks, run, asked(trained, name))[0]
    assert samples == whole[1]
    assert results["speed"]["samples"] == len(samples) - kept
    assert results["correct"] == whole[0]["correct"]
    assert {path.name for path in (trained / name).iterdir()} == {
        ".lock", "settings.json", "samples.jsonl", "results.json"
    }  # fmt: skip


def test_a_sample_that_a_kill_left_in_two_files_counts_once(trained, whole):
    folder = _interrupted(trained, "twice", 4, 0)
    shutil.copy(folder / "samples-0.jsonl", folder / "samples.jsonl")
    results, samples = run_ranks(2, run, asked(trained, "twice"))[0]
    assert samples == whole[1]
    assert results["total"] == len(samples)


def test_a_finished_evaluation_tells_its_results_again_without_the_model(trained, whole):
    shutil.copytree(trained / "whole", trained / "again")
    results, samples = run_ranks(2, run, asked(trained, "again"))[0]
    assert results["speed"]["samples"] == 0
    assert samples == whole[1]
    assert results["accuracy"] == whole[0]["accuracy"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"limit": 3}, "samples, questions"),
        ({"prompt": "chat"}, "questions, prompt"),
        ({"max_new_tokens": 12}, "questions"),
        ({"dtype": "bf16"}, "products"),
        ({"task": "loss", "max_new_tokens": None}, "task"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(trained, whole, changes, told):
    with pytest.raises(AssertionError, match=f"holds another evaluation .*{told}"):
        run_ranks(2, run, asked(trained, "whole", **changes))
    assert read_samples(trained / "whole") == whole[1]


def test_another_model_is_refused_and_another_batch_size_is_not(trained, whole):
    shutil.copytree(trained / "model", trained / "other")
    from safetensors.torch import load_file, save_file

    tensors = load_file(trained / "other" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, trained / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="differing in weights"):
        run_ranks(1, run, asked(trained, "whole", model=str(trained / "other")))
    shutil.copytree(trained / "model", trained / "moved")
    _interrupted(trained, "elsewhere", 5, 9)
    assert run_ranks(1, run, asked(trained, "elsewhere", model=str(trained / "moved"), batch_size=2))[0][1] == whole[1]


def test_a_folder_that_holds_something_else_is_refused(trained):
    (trained / "mine").mkdir()
    (trained / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(AssertionError, match="holds something that is no evaluation"):
        run_ranks(1, run, asked(trained, "mine"))
    assert [path.name for path in (trained / "mine").iterdir()] == ["letter.txt"]


def test_a_real_kill_loses_no_finished_sample(trained, whole):
    """A process that is killed as soon as it has written something; the command goes on from there."""
    folder = trained / "killed"
    words = [
        "launch/evaluate.py", "--model", str(trained / "model"), "--task", "gsm8k", "--data",
        str(trained / "questions"), "--output", str(folder), "--dtype", "fp32", "--max_new_tokens", "24",
        "--batch_size", "1",
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < until and not _size(folder):
            time.sleep(0.001)
        process.kill()
    before = read_samples(folder)
    assert before
    done = outcome_forked(trained, *words)
    assert done.returncode == 0, done.stderr
    assert read_samples(folder) == whole[1]
    if len(before) < len(whole[1]):
        assert f"{len(before)} of {len(whole[1])} samples are in" in done.stdout
    results = json.loads((folder / "results.json").read_text())
    assert results["speed"]["samples"] == len(whole[1]) - len(before)
    assert "accuracy" in done.stdout
    assert "sorsa_ds" in results["versions"]


def _size(folder):
    part = folder / "samples-0.jsonl"
    return part.stat().st_size if part.exists() else 0
