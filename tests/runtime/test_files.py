"""Files that are never seen half-written, and what lies about while they are written."""

import os

import pytest
import torch
from safetensors.torch import save_file

from sorsa_ds.runtime import files
from sorsa_ds.runtime.files import private_folder, write_atomic, write_json, write_text
from sorsa_ds.runtime.whole_folder import whole_folder


def test_every_file_may_be_read_by_whom_any_other_may(tmp_path):
    """safetensors itself makes files of mode 0600, which nobody else on a shared disk could resume from or load."""
    write_text(tmp_path / "text", "x")
    write_atomic(tmp_path / "numbers", lambda temporary: save_file({"x": torch.ones(2)}, temporary))
    assert (tmp_path / "numbers").stat().st_mode == (tmp_path / "text").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers", "text"]
    (tmp_path / "made").mkdir()
    with whole_folder(tmp_path / "whole"):
        pass
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "made").stat().st_mode


def test_what_is_being_written_lies_where_nobody_else_can_plant_a_link(tmp_path):
    seen = []
    for _ in range(2):
        write_atomic(tmp_path / "text", lambda temporary: seen.append(temporary.parent))
    assert seen[0] != seen[1]
    assert all(folder.parent == tmp_path and not folder.exists() for folder in seen)
    with private_folder(tmp_path / "text") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_link_at_the_name_that_a_process_once_used_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / f".text.{os.getpid()}.tmp").symlink_to(target)
    (tmp_path / "text").symlink_to(target)
    write_text(tmp_path / "text", "x")
    assert target.read_text() == "precious"
    assert (tmp_path / "text").read_text() == "x" and not (tmp_path / "text").is_symlink()


def _killed_while_writing(path):
    """Leave behind what a process leaves that is killed while it writes `path`."""
    if (child := os.fork()) == 0:
        write_atomic(path, lambda temporary: os._exit(9))
    os.waitpid(child, 0)


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path):
    _killed_while_writing(tmp_path / "text")
    [left] = tmp_path.iterdir()
    others = [tmp_path / name for name in (".text.tmp", ".text.0123.tmp", ".other.01234567.tmp", ".text.not-ours.tmp")]
    for folder in others:
        folder.mkdir()
    (tmp_path / ".text.file0000.tmp").touch()
    (tmp_path / ".text.link0000.tmp").symlink_to(others[0])
    write_text(tmp_path / "text", "x")
    assert not left.exists()
    assert all(path.exists() for path in (*others, tmp_path / ".text.file0000.tmp", tmp_path / ".text.link0000.tmp"))


def test_a_folder_that_a_process_left_before_it_took_the_lock_is_swept_once_it_is_old(tmp_path):
    new, old, filled = (tmp_path / f".text.{name}.tmp" for name in ("new00000", "old00000", "filled00"))
    for folder in (new, old, filled):
        folder.mkdir()
    (filled / "notes").touch()
    for folder in (old, filled):
        os.utime(folder, (0, 0))
    write_text(tmp_path / "text", "x")
    assert new.exists() and filled.exists() and not old.exists()


def test_what_a_living_process_is_writing_stays(tmp_path):
    with private_folder(tmp_path / "text") as folder:
        write_text(tmp_path / "text", "from elsewhere")
        assert folder.is_dir()
    assert not folder.exists()


def test_a_folder_that_was_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    made, make = [], files.tempfile.mkdtemp

    def swept_once(**options):
        made.append(make(**options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(files.tempfile, "mkdtemp", swept_once)
    write_text(tmp_path / "text", "x")
    assert len(made) == 2 and (tmp_path / "text").read_text() == "x"


def test_a_folder_that_is_gone_is_made_only_where_that_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        write_atomic(tmp_path / "gone" / "text", lambda temporary: None, parents=False)
    assert not (tmp_path / "gone").exists()
    write_text(tmp_path / "gone" / "text", "x")


def test_an_error_leaves_the_older_file_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "text", "old")

    def full(temporary):
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"text: cannot be written \(No space left on device\)"):
        write_atomic(tmp_path / "text", full)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    assert (tmp_path / "text").read_text() == "old"


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_a_number_that_json_cannot_hold_is_named_with_its_place_and_file(tmp_path, number):
    file = tmp_path / "report.json"
    write_json(file, {"loss": 1.5})
    with pytest.raises(ValueError) as caught:
        write_json(file, {"layers": [{"error": 0.5}, {"error": number}]})
    assert str(caught.value) == f"{file}: layers.1.error is {number}, which JSON cannot hold"
    assert file.read_text() == '{\n  "loss": 1.5\n}\n'
