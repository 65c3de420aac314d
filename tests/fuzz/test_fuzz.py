"""Changed files are accepted or refused in words; and the fuzzer sees a reader that does neither."""

import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from sorsa_ds.config.fields import leaves
from sorsa_ds.config.schema import RunConfig
from tests.fuzz import of_settings, rules, run, tables
from tests.fuzz.kinds import Case, Kind

PROGRAM = Path(run.__file__)
MUTATIONS = 60
"""Changed files of each kind, for every run of the tests; more stand in CONTRIBUTING.md."""


@pytest.mark.slow
def test_no_changed_file_ends_in_another_error_hangs_or_is_accepted_without_sense():
    command = [sys.executable, str(PROGRAM), "--mutations", str(MUTATIONS)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=600, check=False)
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-4000:]
    assert found.pop("tried") > 6 * MUTATIONS
    assert found == {"tracebacks": 0, "hangs": 0, "accepted_nonsense": 0}


def accept(folder, extra):
    """A reader that asks nothing."""
    return True


def fail(folder, extra):
    raise KeyError("nobody has put this into words")


def leak(folder, extra):
    json.loads("{")


def mumble(folder, extra):
    raise ValueError("something is wrong")


def refuse(folder, extra):
    raise ValueError("run.yaml: something is wrong")


def sleep(folder, extra):
    time.sleep(60)


def end(folder, extra):
    import os

    os._exit(9)


@pytest.mark.parametrize(
    ("read", "content", "verdict"),
    [
        (accept, b"train:\n  steps: 5\n", "accepted"),
        (accept, b"train:\n  steps: 0\n", "nonsense"),
        (accept, b"train: {steps: 1000000001}\n", "nonsense"),
        (accept, b"train: &a {steps: 5}\nsorsa: *a\n", "nonsense"),
        (accept, b"trian: {steps: 5}\n", "nonsense"),
        (accept, b"output: {name: 123}\n", "accepted"),
        (accept, b"model: \xff\n", "nonsense"),
        (refuse, b"", "refused"),
        (fail, b"", "traceback"),
        (leak, b"", "traceback"),
        (mumble, b"", "traceback"),
    ],
)
def test_every_verdict_is_given_where_it_belongs(monkeypatch, read, content, verdict):
    kind = Kind("planted", "run.yaml", of_settings.make_yaml, read, of_settings.judge_yaml, ())
    monkeypatch.setattr(run, "kinds", lambda: {"planted": kind})
    assert run.examine(Case("planted", 0, content))[0] == verdict


def test_a_reader_that_hangs_or_ends_the_process_is_told_and_the_others_go_on(monkeypatch, capsys):
    whole = ((b"train: {steps: 5}", None),)
    planted = {
        read.__name__: Kind(read.__name__, "run.yaml", of_settings.make_yaml, read, of_settings.judge_yaml, whole)
        for read in (sleep, end, accept)
    }
    monkeypatch.setattr(run, "kinds", lambda: planted)
    monkeypatch.setattr(run, "prepare", lambda: None)
    monkeypatch.setattr(run, "SECONDS", 0.5)
    assert run.fuzz(0) == {"tried": 3, "tracebacks": 1, "hangs": 1, "accepted_nonsense": 0}
    told = capsys.readouterr().out
    assert "hang: sleep number -1" in told
    assert "traceback: end number -1, seed 0: the process ended with code 9" in told


def test_an_unchanged_file_that_is_refused_is_a_fault(monkeypatch):
    kind = Kind("strict", "run.yaml", of_settings.make_yaml, refuse, of_settings.judge_yaml, ((b"", None),))
    monkeypatch.setattr(run, "kinds", lambda: {"strict": kind})
    monkeypatch.setattr(run, "prepare", lambda: None)
    assert run.fuzz(0) == {"tried": 1, "tracebacks": 1, "hangs": 0, "accepted_nonsense": 0}


def test_the_same_seed_makes_the_same_files_and_another_makes_others():
    for name, kind in run.kinds().items():
        one, same, other = ([case.content for case in run.cases(kind, 5, seed)[-5:]] for seed in (0, 0, 1))
        assert one == same != other, name


def test_the_tables_know_every_setting_and_the_program_s_own_files_make_sense():
    assert tables.SETTINGS.keys() == leaves(RunConfig).keys()
    for path, leaf in leaves(RunConfig).items():
        assert tables.SETTINGS[path](list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default), path
    for kind in run.kinds().values():
        if kind.name.startswith("rows"):
            continue  # their judge is asked with what was read
        facts = True if "YAML" in kind.name else None
        for content, extra in kind.whole:
            kind.judge(content, extra, facts)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', "[NaN]", "[" * 65 + "]" * 65, "1 2", "", "{"])
def test_what_is_not_json_by_the_letter_makes_no_sense(text):
    with pytest.raises(rules.Nonsense):
        rules.strict_json(text)


def test_changes_reach_every_entry_of_a_file():
    from tests.fuzz.mutations import changed_tree, places

    whole = {"a": {"b": [1, 2]}, "c": None}
    changed = [changed_tree(Random(n), whole) for n in range(300)]
    assert places(whole) == [("a",), ("a", "b"), ("a", "b", 0), ("a", "b", 1), ("c",)]
    assert whole == {"a": {"b": [1, 2]}, "c": None}
    assert {str(one.get("c", "gone")) for one in changed} > {"gone", "None", "True"}
    assert any(one.get("a", {}) != whole["a"] for one in changed)
