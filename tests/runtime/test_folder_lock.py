"""The lock of a folder: where it cannot be had, and what happens when the folder is taken away."""

import errno
import fcntl
import os
import shutil

import pytest

from sorsa_ds.runtime import folder_lock
from sorsa_ds.runtime.folder_lock import LOCK_FILE, FolderLostError, RunLock, is_held


@pytest.fixture
def held(tmp_path):
    """A folder whose lock is held, and the lock."""
    folder = tmp_path / "run"
    folder.mkdir()
    lock = RunLock(folder)
    lock.acquire()
    yield folder, lock
    lock.release()


def test_a_folder_in_its_place_is_no_fault(held):
    held[1].check()


def test_a_renamed_folder_is_told_with_its_new_place(held):
    folder, lock = held
    folder.rename(folder.with_name("moved"))
    with pytest.raises(FolderLostError, match=r"run was renamed to .*moved while this process worked in it") as lost:
        lock.check()
    assert lost.value.now == folder.with_name("moved")


def test_a_folder_that_another_has_replaced_is_lost(held):
    folder, lock = held
    shutil.rmtree(folder)
    with pytest.raises(FolderLostError, match="run was removed"):
        lock.check()
    folder.mkdir()
    other = RunLock(folder)
    other.acquire()
    with pytest.raises(FolderLostError, match="run was removed"):
        lock.check()
    other.check()
    other.release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_work_goes_on(tmp_path, monkeypatch, capsys, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    lock = RunLock(tmp_path)
    lock.acquire()
    told = capsys.readouterr().err
    assert f"warning: the file system of {tmp_path} has no locks ({os.strerror(code)})" in told
    assert told.count("\n") == 1
    assert not is_held(tmp_path)
    lock.check()
    lock.release()


def test_another_refusal_is_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    with pytest.raises(ValueError, match=r"\.lock: cannot be written \(Input/output error\)"):
        RunLock(tmp_path).acquire()


def test_the_lock_of_a_folder_that_is_replaced_meanwhile_is_not_taken_for_the_new_one_s(tmp_path, monkeypatch):
    lock, flock = tmp_path / LOCK_FILE, fcntl.flock

    def replaced_first(file, kind):
        monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
        lock.unlink()
        lock.touch()
        flock(file, kind)

    monkeypatch.setattr(folder_lock.fcntl, "flock", replaced_first)
    ours = RunLock(tmp_path)
    ours.acquire()
    ours.check()
    assert is_held(tmp_path)
    ours.release()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="cannot be written"):
        RunLock(tmp_path).acquire()
    assert not (tmp_path / "elsewhere").exists()
