"""A checkpoint of a run that trains, or was stopped, is exported; what stands in the way is told by name."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sorsa_ds import load_adapter
from sorsa_ds.export.command import Options, export
from sorsa_ds.export.options import parse
from sorsa_ds.model.adapter_file import TRAINED
from sorsa_ds.run.checkpoint import trained
from sorsa_ds.run.checkpoint.folder import existing_checkpoints
from sorsa_ds.runtime.folder_lock import RunLock
from tests.helpers.distances import relative
from tests.helpers.runs import rewound, train

pytestmark = pytest.mark.slow
IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(scope="module")
def finished(project):
    """A run of two ranks under ZeRO-3, quantised, with a norm trained whole; its checkpoints are of steps 2, 4, 6."""
    asked = ["residual.storage=nf4", "train.max_start_gap=9", "adapter.train_whole=[norm]"]
    return train(project, "exported-on-the-way", *asked)[0]


@pytest.fixture
def stopped(project, finished, tmp_path):
    """A copy of the run as it was after step 4."""
    copy = rewound(project, finished, f"stopped-{tmp_path.name}", 4)
    yield copy
    shutil.rmtree(copy)


def by_hand(checkpoint, name: str) -> torch.Tensor:
    """A trained tensor in the order of its numbers, from the files of all ranks."""
    pieces = {}
    for file in sorted(checkpoint.glob("rank-*.safetensors")):
        for key, value in load_file(file).items():
            if key.startswith(f"values/{name}@"):
                pieces[int(key.rpartition("@")[2])] = value
    return torch.cat([pieces[start] for start in sorted(pieces)])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def test_the_newest_checkpoint_of_a_stopped_run_is_exported(stopped, tmp_path):
    export(Options(stopped, "adapter", tmp_path / "adapter", checkpoint="latest"))
    tensors = load_file(tmp_path / "adapter" / TRAINED)
    assert any(name.endswith(".U") for name in tensors) and "model.norm.weight" in tensors
    for name, value in tensors.items():
        assert torch.equal(value.flatten(), by_hand(stopped / "checkpoints" / "step-000004", name)), name
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "the run's state after step 4, from a checkpoint" in card and "| steps | 4 |" in card
    trained = logits(load_adapter(tmp_path / "adapter"))
    export(Options(stopped, "merged", tmp_path / "merged", checkpoint="4", dtype="float32"))
    export(Options(stopped / "checkpoints" / "step-000004", "lora", tmp_path / "lora"))
    export(Options(stopped, "base", tmp_path / "base", checkpoint="step-000002", dtype="float32"))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "base")]
    assert relative(logits(models[1]), trained) > 1e-4
    assert relative(logits(models[0]), trained) < 1e-5
    assert relative(logits(PeftModel.from_pretrained(models[1], tmp_path / "lora")), trained) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "lora", "merged"]


def test_a_run_that_trains_is_exported_as_it_was(stopped, tmp_path):
    lock = RunLock(stopped)
    lock.acquire()
    try:
        with pytest.raises(
            ValueError, match=r"still trains; .*\nTo export what it has saved so far, add --checkpoint latest"
        ):
            export(Options(stopped, "lora", tmp_path / "out"))
        export(Options(stopped, "lora", tmp_path / "out", checkpoint="latest"))
    finally:
        lock.release()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def disappears(monkeypatch, checkpoint) -> None:
    """Let a checkpoint be removed while its first file is opened."""

    def opened(files):
        if files[0].parent == checkpoint and checkpoint.exists():
            shutil.rmtree(checkpoint)
        return SavedTensors(files)

    SavedTensors = trained.SavedTensors
    monkeypatch.setattr(trained, "SavedTensors", opened)


def test_where_the_run_removes_a_checkpoint_meanwhile_the_newest_is_taken(stopped, tmp_path, monkeypatch):
    disappears(monkeypatch, stopped / "checkpoints" / "step-000004")
    export(Options(stopped, "adapter", tmp_path / "out", checkpoint="latest"))
    assert "after step 2," in (tmp_path / "out" / "README.md").read_text()


def test_where_the_run_removes_the_checkpoint_that_was_named_this_is_said(stopped, tmp_path, monkeypatch):
    disappears(monkeypatch, stopped / "checkpoints" / "step-000002")
    with pytest.raises(ValueError, match=r"step-000002 was removed while it was read: .*--checkpoint latest takes"):
        export(Options(stopped, "adapter", tmp_path / "out", checkpoint="2"))
    assert list(tmp_path.iterdir()) == []


def _damage(run):
    file = run / "checkpoints" / "step-000004" / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _forge(run):
    file = run / "checkpoints" / "step-000004" / "checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "world_size": 1}))


def _swap(run):
    (run / "adapter" / "initial_factors.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "asked", "told"),
    [
        (_damage, "latest", "rank-00001.safetensors is damaged: its digest"),
        (_forge, "latest", "its content does not fit its digest: damaged"),
        (_swap, "latest", "initial_factors.safetensors is missing or damaged"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "latest", "has no checkpoint 'latest'; it has none at all"),
        (lambda run: None, "3", "has no checkpoint '3'; it has step-000004, step-000002"),
        (lambda run: None, "set-aside-1-step-000004", "has no checkpoint 'set-aside"),
        (lambda run: None, "best", "has no checkpoint 'best': a run keeps the best one where it has held-out data"),
        (lambda run: (run / "config.yaml").unlink(), "latest", "--run: .* is not the folder of a run"),
    ],
)
def test_what_cannot_be_exported_is_told_and_leaves_nothing(stopped, tmp_path, spoil, asked, told):
    spoil(stopped)
    with pytest.raises(ValueError, match=told):
        export(Options(stopped, "adapter", tmp_path / "out", checkpoint=asked))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_named_in_one_way(stopped, tmp_path):
    checkpoint = existing_checkpoints(stopped)[0]
    words = ["--run", str(checkpoint), "--checkpoint", "2", "--format", "lora", "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--checkpoint goes with the folder of a run"):
        export(parse(words))
