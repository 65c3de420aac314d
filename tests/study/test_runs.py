"""What runs there are: their states and figures, and that nothing in a folder can hide the others."""

import json
import os
import subprocess
import sys

import pytest

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.config.train_settings import TrainConfig
from sorsa_ds.config.yaml_io import to_yaml
from sorsa_ds.runtime.folder_lock import RunLock
from sorsa_ds.study.runs.command import list_runs
from sorsa_ds.study.runs.index import facts_of, runs_in
from sorsa_ds.study.runs.options import parse
from tests.helpers.projects import ROOT

LINES = [
    {"step": 0, "eval_loss": 1.0},
    {"step": 1, "loss": 4.5},
    {"step": 2, "loss": 3.5},
    {"step": 2, "eval_loss": 3.25, "eval_loss/a": 1.5},
    {"step": 3, "loss": 3.0},
    {"step": 3, "eval_loss": 3.5},
]


def make(folder, name, lines=LINES, steps=10, report=None, ended=None, active=1000.0):
    """The folder of a run, as training would leave it."""
    run = folder / name
    run.mkdir(parents=True)
    config = RunConfig(model="some/model", method="lora", train=TrainConfig(steps=steps))
    (run / "config.yaml").write_text(to_yaml(config, comments=True))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file, content in (("report.json", report), ("ended.json", ended)):
        if content is not None:
            (run / file).write_text(content if isinstance(content, str) else json.dumps(content))
    os.utime(run / "metrics.jsonl", (active, active))
    return run


def test_a_run_at_a_glance(tmp_path):
    found = facts_of(make(tmp_path, "a"))
    assert (found.model, found.method, found.steps, found.planned) == ("some/model", "lora", 3, 10)
    assert (found.loss, found.eval_loss, found.eval_step) == (3.0, 3.25, 2), "the start is no evaluation of the run's"
    assert (found.state, found.why, found.last_active) == ("interrupted", "", 1000.0)


def test_each_state_is_told(tmp_path):
    make(tmp_path, "done", report={"steps": 3, "planned_steps": 3}, active=1)
    make(tmp_path, "early", report={"steps": 3, "planned_steps": 10}, active=2)
    make(tmp_path, "bad", ended={"state": "failed", "step": 3, "why": "the loss is nan\nat step 4"}, active=3)
    make(tmp_path, "told", ended={"state": "interrupted", "step": 3, "why": "SIGTERM"}, active=4)
    make(tmp_path, "empty", lines=[], active=5)
    held = RunLock(make(tmp_path, "on", report={"steps": 1}, active=6))
    held.acquire()
    try:
        found = {one.name: (one.state, one.why) for one in runs_in(tmp_path)}
    finally:
        held.release()
    assert list(found.items()) == [
        ("on", ("running", "")), ("empty", ("failed", "it has not begun")), ("told", ("interrupted", "SIGTERM")),
        ("bad", ("failed", "the loss is nan at step 4")), ("early", ("finished", "stopped early")),
        ("done", ("finished", "")),
    ]  # fmt: skip


DAMAGES = {
    "config.yaml": ["model: [", "a: 1", "model: 3\nmethod: lora", "model: &a x\nmethod: *a", b"model: \xff"],
    "metrics.jsonl": ['{"step": 1, "loss": }\n', '{"loss": 1}\n', '{"step": 1, "loss": "x"}\n', '["loss"]\n',
                      '{"step": 4, "eval_loss": null}\n'],
    "report.json": ["{", "[]"],
    "ended.json": ["{", "{}", "[1]"],
}  # fmt: skip


@pytest.mark.parametrize(("file", "content"), [(file, one) for file, some in DAMAGES.items() for one in some])
def test_a_damaged_run_is_named_with_its_file_and_hides_no_other(tmp_path, file, content):
    broken = make(tmp_path, "broken")
    (broken / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    make(tmp_path, "whole")
    found = {one.name: one for one in runs_in(tmp_path)}
    assert found["broken"].state == "damaged"
    assert file in found["broken"].why or isinstance(content, bytes)
    assert found["whole"].state == "interrupted"


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    run = make(tmp_path, "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert facts_of(run).steps == 3
    with (run / "metrics.jsonl").open("a") as file:
        file.write('ss": 2.5}\n')
    assert (facts_of(run).steps, facts_of(run).loss) == (4, 2.5)


def test_the_table_and_the_json(tmp_path, capsys):
    make(tmp_path, "a")
    make(tmp_path, "b\x1b[31m\nb", ended={"state": "failed", "why": "no\x1b[2Jway"}, active=2000.0)
    (tmp_path / "no-run").mkdir()
    (tmp_path / "file").write_text("x")
    list_runs(parse([str(tmp_path)]))
    head, first, second, why = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "run"
    assert first.startswith(r"b\x1b[31m\nb  failed")
    assert why == r"b\x1b[31m\nb: failed: no\x1b[2Jway"
    assert " ".join(second.split()).startswith("a interrupted lora model 3 / 10 3.0000 3.2500 @ 2")
    list_runs(parse([str(tmp_path), "--json"]))
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == ["b\x1b[31m\nb", "a"]
    assert found[1]["folder"] == str(tmp_path / "a") and found[1]["eval_loss"] == 3.25


def test_a_folder_that_is_a_run_and_one_that_is_not_there(tmp_path, capsys):
    assert [one.name for one in runs_in(make(tmp_path, "a"))] == ["a"]
    with pytest.raises(ValueError, match=r"no: cannot be read \(No such file or directory\)"):
        runs_in(tmp_path / "no")
    (tmp_path / "none").mkdir()
    list_runs(parse([str(tmp_path / "none")]))
    assert capsys.readouterr().out == f"{tmp_path / 'none'} holds no runs.\n"


def test_the_command_imports_nothing_heavy(tmp_path):
    make(tmp_path, "a")
    program = (
        "import sys; from sorsa_ds.study.runs import command, options; command.list_runs(options.parse(sys.argv[1:]));"
        "print([name for name in ('torch', 'transformers', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, text=True, capture_output=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
