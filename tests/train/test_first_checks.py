"""What is wrong with names, files, the hub or keys is told at once, before anything slow is imported."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from sorsa_ds.run import tracker_kinds
from sorsa_ds.runtime import hub
from sorsa_ds.runtime.folder_lock import RunLock
from sorsa_ds.train import first_checks
from sorsa_ds.train.first_checks import check_first, check_own_node, on_one_node
from sorsa_ds.train.options import parse
from tests.helpers.projects import ROOT, settings


@pytest.fixture
def work(project, tmp_path):
    """A copy of the project to work in."""
    for name in ("model", "data.jsonl"):
        source = project / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


def fault(work, *words, name="new", logs=True) -> str:
    """What is found wrong with a command; nothing is an empty text."""
    try:
        check_first(parse([*settings(work, name), *words]), logs)
    except ValueError as error:
        return str(error)
    return ""


def test_a_sound_command_has_no_fault(work):
    assert fault(work) == ""
    assert fault(work, "model=smollm2-135m-instruct", "data.path=word-problems") == ""
    assert fault(work, "--resume", "auto") == ""


def _rewrite_index(work):
    (work / "model" / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (work / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def _cut_weights(work):
    file = work / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _without_tokenizer(work):
    for file in (work / "model").glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "words", "told"),
    [
        (lambda work: (work / "model" / "config.json").unlink(), (), "config.json cannot be read"),
        (lambda work: (work / "model" / "config.json").write_text("[]"), (), "config.json is no JSON object"),
        (lambda work: (work / "model" / "model.safetensors").unlink(), (), "no model.safetensors and no"),
        (_rewrite_index, (), "1 shards are missing, first model-00001-of-00002"),
        (_cut_weights, (), "truncated or not a safetensors file"),
        (_without_tokenizer, (), "has no tokenizer"),
        (lambda work: None, ("model=./nowhere",), "there is no folder './nowhere'"),
        (lambda work: None, ("data.path=nowhere.jsonl",), "data.path: no file or folder 'nowhere.jsonl'"),
        (lambda work: None, ("data.eval_path=nowhere.jsonl",), "data.eval_path: no file or folder"),
        (lambda work: (work / "data.jsonl").write_text(""), (), "data.jsonl is empty"),
        (
            lambda work: (work / "runs").touch(),
            ("output.folder={work}/runs",),
            "output.folder: .*runs does not allow it",
        ),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(work, damage, words, told):
    damage(work)
    found = fault(work, *(word.format(work=work) for word in words))
    with pytest.raises(ValueError, match=told):
        raise ValueError(found)


def test_names_of_runs_are_looked_at(work):
    (work / "taken").mkdir()
    (work / "taken" / "metrics.jsonl").write_text('{"step": 0}\n')
    assert "output.name: " in fault(work, name="taken")
    assert "holds a run already" in fault(work, name="taken")
    assert fault(work, "--resume", "auto", name="taken") == ""
    run = work / "run"
    assert "--resume: there is no folder" in fault(work, "--resume", str(run))
    run.mkdir()
    assert "is not the folder of a run" in fault(work, "--resume", str(run))
    shutil.copy(ROOT / "tests" / "fixtures" / "run_of_0.1.0" / "config.yaml", run)
    assert "has saved nothing; to begin it anew: " in fault(work, "--resume", str(run))
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    assert fault(work, "--resume", str(run)) == ""
    lock = RunLock(run)
    lock.acquire()
    assert "still trains" in fault(work, "--resume", str(run))
    lock.release()
    (run / "report.json").write_text("{}")
    assert "is finished" in fault(work, "--resume", str(run))


@pytest.mark.parametrize("setting", ["model", "data.path", "data.eval_path"])
def test_names_on_the_hub_are_asked_for_once(work, monkeypatch, setting):
    asked = []

    def answer(kind, name, file, revision=None, needed=False):
        asked.append((kind, name))
        return name == "me/there"

    monkeypatch.setattr(hub, "can_be_read", answer)
    assert fault(work, f"{setting}=me/there") == ""
    assert "cannot be reached, and Hugging Face's cache has no copy" in fault(work, f"{setting}=me/away")
    kind = "model" if setting == "model" else "dataset"
    assert asked == [(kind, "me/there"), (kind, "me/away")]

    def refuse(*_, **__):
        raise ValueError("me/gated is open only to those who have asked")

    monkeypatch.setattr(hub, "can_be_read", refuse)
    assert "only to those who have asked" in fault(work, f"{setting}=me/gated")


def test_everything_is_told_at_once(work):
    told = fault(work, "model=./no", "data.path=no.csv").splitlines()
    assert [line.split(":")[0] for line in told] == ["model", "data.path"]


@pytest.fixture
def no_key(tmp_path, monkeypatch):
    """A user who has never logged in to Weights & Biases."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb"))


def test_wandb_online_needs_a_key(work, no_key, monkeypatch):
    told = fault(work, "output.wandb=online")
    assert told.startswith("output.wandb=online: there is no key for https://")
    assert "wandb login" in told
    assert "WANDB_API_KEY" in told
    assert fault(work, "output.wandb=online", logs=False) == "", "another process writes the logs"
    assert fault(work, "output.wandb=offline") == ""
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert fault(work, "output.wandb=online") == ""
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert "output.wandb=online: WANDB_API_KEY invalid" in fault(work, "output.wandb=online")


def test_trackers_that_are_not_installed_are_named(work, no_key, monkeypatch):
    refused = "output.trackers: not installed here: mlflow, trackio; pip install mlflow trackio"
    with monkeypatch.context() as patched:
        patched.setattr(tracker_kinds.importlib.util, "find_spec", lambda name: None)
        assert fault(work, "output.trackers=[mlflow, trackio]") == refused
        assert fault(work, "output.trackers=[mlflow]", logs=False) == "", "another process writes the logs"
    assert "there is no key for" in fault(work, "output.trackers=[wandb]"), "it logs online where that is all"


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, True),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "4"}, False),
    ],
)
def test_on_several_nodes_the_preflight_tells_all_of_them(monkeypatch, environment, alone):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert on_one_node() is alone


def test_the_first_rank_of_a_node_looks_and_the_first_of_all_has_the_key(monkeypatch):
    looked = []
    monkeypatch.setattr(first_checks, "check_first", lambda invocation, logs: looked.append(logs))
    for rank, local in (("0", "0"), ("1", "1"), ("2", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        check_own_node(None)
    assert looked == [True, False]


def test_nothing_slow_is_imported():
    program = (
        "import sys; import sorsa_ds.train.first_checks;"
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'datasets', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_the_command_ends_before_anything_is_prepared(work, no_key):
    words = [*settings(work, "new"), "output.wandb=online", "data.path=no.jsonl"]
    done = subprocess.run([sys.executable, "launch/train.py", *words], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "data.path: no file or folder 'no.jsonl'" in done.stderr
    assert "output.wandb=online: there is no key" in done.stderr
    assert not (work / "new").exists()


def test_every_source_of_a_mix_is_looked_at(work):
    mix = "data.mix=[{path: word-problems}, {path: nowhere.jsonl}]"
    told = fault(work, "data.path=word-problems", mix)
    assert told.startswith("data.mix, nowhere.jsonl: data.path: no file or folder 'nowhere.jsonl' here")
