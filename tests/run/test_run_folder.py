"""A run's folder: its log, and what is said where its name is taken."""

import pytest

from sorsa_ds.run.finished import RunState
from sorsa_ds.run.metrics import read_metrics
from sorsa_ds.run.ways_on import from_a_taken_name
from sorsa_ds.runtime.folder_lock import RunLock


@pytest.mark.parametrize("damage", [b"\xff", b"{", b"[1]", b"7", b'{"loss": 1}', b"\x00"])
def test_a_damaged_line_of_the_log_is_named(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*the file is damaged"):
        read_metrics(tmp_path)


def test_a_last_line_that_a_kill_has_cut_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_run_that_trains_is_told_from_one_that_can_go_on(tmp_path):
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert from_a_taken_name(RunState(tmp_path)).startswith("which still trains; to train another: ")
    lock.release()
    assert from_a_taken_name(RunState(tmp_path)).startswith("which is unfinished; to go on with it: ")


def test_the_other_name_is_one_that_is_free(tmp_path):
    run = tmp_path / "mine"
    for name in ("mine", "mine-2"):
        (tmp_path / name).mkdir()
    (run / "report.json").touch()
    assert from_a_taken_name(RunState(run)).endswith(" output.name=mine-3")
