"""What cannot be exported is refused before anything is written, and a kill or a full disk leaves nothing."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from sorsa_ds.export.command import Options, export
from sorsa_ds.model import adapter_file, tensor_file
from sorsa_ds.runtime.folder_lock import RunLock, is_held
from tests.helpers.architectures import save
from tests.helpers.exported import change_description
from tests.helpers.finished import base_of

ROOT = Path(__file__).parents[2]


def _flip(run):
    base = base_of(run)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] += 1e-6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def _reshape(run):
    file = base_of(run) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 48}))


def _cut(run):
    file = run / "adapter" / adapter_file.TRAINED
    file.write_bytes(file.read_bytes()[:-100])


def _narrow(run):
    file = run / "adapter" / adapter_file.TRAINED
    tensors = load_file(file)
    save_file({name: t[:, :2].contiguous() if t.dim() == 2 else t[:2] for name, t in tensors.items()}, file)


def _forget(run):
    digests = adapter_file.read_description(run / "adapter").digests
    change_description(run, digests={name: d for name, d in digests.items() if "1.mlp.up_proj" not in name})


LOCKS = []


def _hold(run):
    LOCKS.append(RunLock(run))
    LOCKS[-1].acquire()


@pytest.mark.parametrize("form", ["merged", "lora", "adapter"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is not the folder of a run"),
        (
            lambda run: (run / "report.json").unlink(),
            "is unfinished: it has no report.json; to go on with it: .*--resume",
        ),
        (lambda run: (run / "report.json").write_text("{"), "report.json is damaged"),
        (_hold, "still trains"),
        (_flip, "up_proj.weight is not the weight that was trained on: this is another base"),
        (lambda run: save("qwen3", base_of(run)), "wrong base model"),
        (_reshape, "config.json and weights do not belong together"),
        (_cut, "trained_factors.safetensors: missing, truncated"),
        (lambda run: (run / "adapter" / adapter_file.INITIAL).unlink(), "initial_factors.safetensors: missing"),
        (_narrow, "has other shapes than in this model"),
        (_forget, "no digest of model.layers.1.mlp.up_proj.weight"),
        (lambda run: (base_of(run) / "model.safetensors").unlink(), "no model.safetensors"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(runs, tmp_path, form, spoil, message):
    run = shutil.copytree(runs("llama"), tmp_path / "run")
    base = shutil.copytree(base_of(run), tmp_path / "base")
    change_description(run, base_model=str(base))
    before = set(tmp_path.rglob("*"))
    spoil(run)
    with pytest.raises(ValueError, match=message):
        export(Options(run, form, tmp_path / "out"))
    assert {path for path in tmp_path.rglob("*") if path.name != ".lock"} <= before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "merged", "rank": 4}, "--rank goes with --format lora"),
        ({"form": "lora", "dtype": "float16"}, "--dtype goes with --format merged"),
        ({"form": "adapter", "max_shard_size": "1GB"}, "--max_shard_size goes with --format merged"),
        ({"form": "lora", "rank": 0}, "at least rank 1"),
        ({"form": "merged", "max_shard_size": "large"}, "--max_shard_size large: write it as 5GB"),
        ({"form": "lora", "private": True}, "--private goes with --push_to_hub"),
    ],
)
def test_options_that_mean_nothing_are_refused(runs, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export(Options(runs("llama"), options.pop("form"), tmp_path / "out", **options))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("dear to me")
    with pytest.raises(ValueError, match="is not an empty folder"):
        export(Options(runs("llama"), "lora", tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    export(Options(runs("llama"), "lora", tmp_path / "empty"))


def test_a_full_disk_leaves_nothing(runs, tmp_path, monkeypatch):
    written = []

    def full(tensor):
        written.append(tensor)
        if len(written) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return raw(tensor)

    raw = tensor_file.raw
    monkeypatch.setattr(tensor_file, "raw", full)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\)"):
        export(Options(runs("llama"), "merged", tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="would take 0.0 GB"):
        export(Options(runs("llama"), "merged", tmp_path / "out"))


def test_a_killed_export_looks_unfinished_and_is_cleared_away(runs, tmp_path):
    run = runs("llama")
    if (child := os.fork()) == 0:
        tensor_file.raw = lambda tensor: os.kill(os.getpid(), signal.SIGKILL)
        export(Options(run, "merged", tmp_path / "out"))
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    [left] = [path.name for path in tmp_path.iterdir()]
    assert left.startswith(".out.") and left.endswith(".tmp")
    export(Options(run, "merged", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_the_lock_of_a_run_ends_with_its_process(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom sorsa_ds.runtime.folder_lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]))\nlock.acquire()\nprint('held', flush=True)\ntime.sleep(60)"
    )
    assert not is_held(tmp_path)
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"held\n"
        assert is_held(tmp_path)
        with pytest.raises(ValueError, match="is in use"):
            RunLock(tmp_path).acquire()
        child.kill()
    assert not is_held(tmp_path)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert is_held(tmp_path)
    lock.release()
    assert not is_held(tmp_path)
