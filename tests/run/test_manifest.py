"""checkpoint.json, also one that somebody has made: every entry is checked before anything is done with it."""

import json
from pathlib import Path

import pytest

from sorsa_ds.run.checkpoint import manifest

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0" / "checkpoints" / "step-000003"
WHOLE = json.loads((CHECKPOINT / manifest.FILE).read_text())


def refusal(folder, found) -> str:
    """What is said to a manifest whose digest fits it."""
    checkpoint = folder / "step-000003"
    checkpoint.mkdir(exist_ok=True)
    if isinstance(found, dict):
        found = {**found, "digest": manifest._digest_of(found)}
    (checkpoint / manifest.FILE).write_text(json.dumps(found))
    with pytest.raises(ValueError) as caught:
        manifest.read_manifest(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint / manifest.FILE}: not a checkpoint (")
    return str(caught.value)


def with_entry(path: str, value) -> dict:
    found = json.loads(json.dumps(WHOLE))
    del found["digest"]
    section = found
    *sections, last = path.split("/")
    for name in sections:
        section = section[name]
    section[last] = value
    return found


def test_a_manifest_of_an_earlier_version_is_read():
    found = manifest.read_manifest(CHECKPOINT)
    assert found.progress.step == 3
    assert found.files == WHOLE["files"]
    assert found.scheduler == WHOLE["scheduler"]
    assert not manifest.file_faults(CHECKPOINT, found)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("progress/step", "3", "progress.step"),
        ("progress/step", 4, "it is that of step 4"),
        ("progress/seconds", -1.0, "progress.seconds"),
        ("progress/unheard", 1, "progress.unheard"),
        ("world_size", 0, "world_size"),
        ("world_size", 10**18, "world_size"),
        ("zero_stage", 7, "zero_stage"),
        ("zero_stage", False, "zero_stage"),
        ("config/loading/revision", True, "loading.revision"),
        ("scheduler", [], "scheduler"),
        ("scheduler/last_epoch", 2, "scheduler: it is that of another step"),
        ("scheduler/_last_lr", ["x"], "scheduler._last_lr"),
        ("regularizer/form", "round", "form"),
        ("regularizer/coefficient", -1, "coefficient"),
        ("regularizer/unheard", 1, "unheard"),
        ("config", [], "config"),
        ("config/train", None, "config.train"),
        ("config/regularizer", 5, "config.regularizer: is no section"),
        ("config/train/global_batch_size", 10**18, "config.train: global_batch_size"),
        ("config/train/micro_batch_size", "2", "config.train: micro_batch_size"),
        ("config/sorsa/rank", [1], "adapter.rank"),
        ("config/train/seed", {"enabled": True}, "train.seed"),
        ("config/model", "a\0b", "NUL"),
        ("base", [], "base"),
        ("initial_factors", "x", "initial_factors"),
        ("files", {"../../../etc/passwd": {"bytes": 1, "digest": "0" * 32}}, "files"),
        ("files/rank-00000.safetensors", {}, "files.rank-00000.safetensors: bytes"),
        ("files/rank-00000.safetensors/bytes", -5, "files.rank-00000.safetensors: bytes"),
        ("versions", {"torch": 2}, "versions.torch"),
        ("unheard", 1, "unheard"),
    ],
)
def test_an_entry_of_another_type_or_out_of_range_is_named(tmp_path, path, value, named):
    assert named in refusal(tmp_path, with_entry(path, value))


def test_settings_that_another_version_wrote_are_not_looked_at(tmp_path):
    found = with_entry("config/sorsa/of_another_version", {"a": [1]})
    folder = tmp_path / "step-000003"
    folder.mkdir()
    (folder / manifest.FILE).write_text(json.dumps({**found, "digest": manifest._digest_of(found)}))
    assert manifest.read_manifest(folder).config["sorsa"]["of_another_version"] == {"a": [1]}


@pytest.mark.parametrize("found", [[], None, 5, {}, {"format": 2}, {"format": 1}])
def test_what_is_no_manifest_is_refused(tmp_path, found):
    refusal(tmp_path, found)
