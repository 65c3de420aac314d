"""The folder in which a checkpoint is written before it is one, and what lies beside it."""

import shutil

import pytest

from sorsa_ds.run.checkpoint import folder
from sorsa_ds.run.checkpoint.folder import commit_checkpoint, existing_checkpoints, make_temporary
from sorsa_ds.run.paths import CHECKPOINTS


@pytest.fixture
def beside(tmp_path):
    """The folder of a run's checkpoints."""
    folder = tmp_path / CHECKPOINTS
    folder.mkdir()
    return folder


def test_what_others_have_put_under_such_names_stays_and_no_save_fails(tmp_path, beside):
    (beside / ".step-000004.tmp").touch()
    (tmp_path / "precious").mkdir()
    (beside / ".step-000005.tmp").symlink_to(tmp_path / "precious")
    (beside / ".step-000004.notes").mkdir()
    for step in (4, 5):
        commit_checkpoint(make_temporary(tmp_path, step), step, keep=2)
    assert [path.name for path in existing_checkpoints(tmp_path)] == ["step-000005", "step-000004"]
    assert (beside / "latest").read_text() == "step-000005\n"
    others = {".step-000004.tmp", ".step-000005.tmp", ".step-000004.notes"}
    assert others < {path.name for path in beside.iterdir()}
    assert (tmp_path / "precious").is_dir()


def test_a_checkpoint_that_cannot_be_named_the_best_is_valid_all_the_same(tmp_path, beside, monkeypatch, capsys):
    write = folder.write_text

    def refusing(path, text, parents):
        if path.name == "best":
            raise ValueError("best: cannot be written (No space left on device)")
        write(path, text, parents)

    commit_checkpoint(make_temporary(tmp_path, 2), 2, keep=1)
    monkeypatch.setattr(folder, "write_text", refusing)
    commit_checkpoint(make_temporary(tmp_path, 4), 4, keep=1, best=True)
    assert [path.name for path in existing_checkpoints(tmp_path)] == ["step-000004"]
    assert (beside / "latest").read_text() == "step-000004\n"
    assert "step-000004 is saved, and is not named as the best one: best: cannot" in capsys.readouterr().err


def test_what_killed_runs_have_left_is_removed(tmp_path, beside):
    first = make_temporary(tmp_path, 4)
    (first / "rank-00000.safetensors").touch()
    (beside / ".step-000002.tmp").mkdir()  # as earlier versions named it
    second = make_temporary(tmp_path, 4)
    assert list(beside.iterdir()) == [second] != [first]


def test_what_cannot_be_removed_is_told_and_no_save_fails(tmp_path, beside, monkeypatch, capsys):
    (beside / ".step-000002.tmp").mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    make_temporary(tmp_path, 4)
    assert ".step-000002.tmp: left by a run that was killed, and cannot be removed" in capsys.readouterr().err


def test_a_run_that_is_removed_before_or_during_a_save_is_not_made_anew(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(FileNotFoundError):
        make_temporary(run, 4)
    assert not run.exists()
    run.mkdir()
    temporary = make_temporary(run, 4)
    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError):
        commit_checkpoint(temporary, 4, keep=2)
    assert not run.exists()


def test_a_run_that_is_removed_between_a_checkpoints_name_and_the_pointer_to_it_is_not_made_anew(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    temporary = make_temporary(run, 4)
    monkeypatch.setattr("sorsa_ds.run.checkpoint.folder.fsync", lambda path: path == temporary or shutil.rmtree(run))
    commit_checkpoint(temporary, 4, keep=2)
    assert not run.exists()
