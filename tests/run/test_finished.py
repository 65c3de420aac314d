"""The state of a run, as its folder tells it in every phase of the run's life."""

import json

import pytest

from sorsa_ds.config.command_line import to_yaml
from sorsa_ds.config.schema import AdapterConfig, RunConfig
from sorsa_ds.run.finished import FinishedRun, RunState, near_runs
from sorsa_ds.runtime.folder_lock import RunLock


@pytest.fixture
def finished(tmp_path):
    """A finished run's folder, as far as its state goes."""
    run = tmp_path / "run"
    for step in (2, 10):
        (run / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (run / "checkpoints" / ".step-000012.tmp").mkdir()
    (run / "config.yaml").write_text(to_yaml(RunConfig(adapter=AdapterConfig(rank=7))))
    (run / "report.json").write_text(json.dumps({"steps": 12}))
    return run


def test_a_finished_run_tells_what_it_was(finished):
    run = FinishedRun.open(finished, "--run")
    assert (run.is_run, run.is_running, run.is_finished) == (True, False, True)
    assert run.report() == {"steps": 12}
    assert run.settings().adapter.rank == 7
    assert run.saved_settings()["adapter"]["rank"] == 7
    assert [path.name for path in run.checkpoints] == ["step-000010", "step-000002"]


def test_a_folder_that_is_no_run_says_so(tmp_path):
    state = RunState(tmp_path)
    assert (state.is_run, state.is_running, state.is_finished, state.checkpoints) == (False, False, False, [])
    assert not state.has_begun
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "init.json").write_text("{}")
    assert not state.has_begun  # it failed before it had measured anything
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert state.has_begun
    with pytest.raises(ValueError, match=r"--model: .* is not the folder of a run: it has no config\.yaml"):
        FinishedRun.open(tmp_path, "--model")
    with pytest.raises(ValueError, match="--resume: .* is not the folder of a run"):
        state.check_is_run("--resume")


def test_a_name_is_taken_by_what_was_measured_saved_or_finished(finished):
    run = RunState(finished)
    assert run.has_begun
    (finished / "report.json").unlink()
    assert run.has_begun  # it has checkpoints


def test_a_run_that_trains_or_is_unfinished_is_refused(finished):
    (finished / "report.json").unlink()
    with pytest.raises(
        ValueError, match=r"--run: .*is unfinished: it has no report\.json; to go on with it: .*--resume"
    ):
        FinishedRun.open(finished, "--run")
    lock = RunLock(finished)
    lock.acquire()
    assert RunState(finished).is_running
    with pytest.raises(ValueError, match="--run: .* still trains; come back when it is done"):
        FinishedRun.open(finished, "--run")
    lock.release()
    assert not RunState(finished).is_running


def test_damaged_files_are_named(finished):
    (finished / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json is damaged"):
        FinishedRun.open(finished, "--run").report()
    (finished / "report.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"report\.json is damaged: more than 64 lists and objects"):
        FinishedRun.open(finished, "--run").report()
    for text, fault in (("a: &a [1]\nb: *a\n", "an alias"), ("[" * 100_000, "more than 64"), ("- 1\n", "no settings")):
        (finished / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.yaml.*{fault}"):
            RunState(finished).saved_settings()
    (finished / "config.yaml").write_text("sorsa: {rnk: 7}\n")
    with pytest.raises(ValueError, match=r"did you mean adapter\.rank"):
        RunState(finished).settings()


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("frist", "; did you mean first run?"),
        ("first", "; did you mean first run?"),
        ("firts run", "; did you mean first run?"),
        ("other", ""),
        ("x", ""),
    ],
)
def test_a_run_whose_name_is_nearly_typed_is_named(finished, tmp_path, monkeypatch, typed, near):
    finished.rename(tmp_path / "first run")
    monkeypatch.chdir(tmp_path)
    assert near_runs(tmp_path / typed) == near
