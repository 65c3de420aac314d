"""A child process that answers questions, whatever happens to it and to its parent."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from sorsa_ds.runtime.line_process import LineProcess

CHILD = """
import os, sys, time
from sorsa_ds.runtime.line_process import serve
def answer(question):
    if question == "leave": os._exit(3)
    if question == "wait": time.sleep(600)
    if question == "allocate": return len(bytes(2**30))
    return [question, os.getpid()]
serve(answer)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    (tmp_path / "answering_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process = LineProcess("answering_child", seconds=1.0, memory=2**28)
    yield process
    process.end()


def test_questions_are_answered_by_one_process_until_it_is_ended(child):
    question = {"a": [1, None, "ü\n\ud800"]}
    (first, pid), (second, same) = child.ask(question), child.ask(2)
    assert (first, second, same) == (question, 2, pid)
    child.end()
    assert not psutil.pid_exists(pid)
    assert child.ask(3)[1] != pid


@pytest.mark.slow
def test_an_answer_that_does_not_come_and_a_child_that_leaves_are_told_apart(child):
    with pytest.raises(TimeoutError, match="within 1 s"):
        child.ask("wait")
    with pytest.raises(ChildProcessError, match="exit code 3"):
        child.ask("leave")
    with pytest.raises(ChildProcessError):
        child.ask("allocate")
    assert child.ask("next")[0] == "next"


def test_what_json_cannot_hold_arrives_as_the_name_of_its_type(child):
    assert child.ask([b"a", {1}])[0] == ["<bytes>", "<set>"]


def test_a_forked_process_gets_a_child_of_its_own(child):
    pid = child.ask("here")[1]
    told, tell = os.pipe()
    forked = os.fork()
    if forked == 0:
        try:
            os.write(tell, str(child.ask("there")[1]).encode())
            child.end()
        finally:
            os._exit(0)
    os.waitpid(forked, 0)
    assert int(os.read(told, 100)) not in (pid, 0)
    assert child.ask("again")[1] == pid


def test_a_child_that_does_not_start_says_why():
    with pytest.raises(RuntimeError, match="No module named no_such_module"):
        LineProcess("no_such_module", seconds=1.0, memory=2**28).ask(1)


@pytest.mark.slow
def test_the_child_of_a_killed_parent_ends_even_in_the_midst_of_an_answer(child, tmp_path):
    file = tmp_path / "pid"
    (tmp_path / "telling_child.py").write_text(
        CHILD.replace("time.sleep(600)", f"open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    )
    source = (
        "from sorsa_ds.runtime.line_process import LineProcess\n"
        "LineProcess('telling_child', seconds=1.0, memory=2**28).ask('wait')"
    )
    parent = subprocess.Popen([sys.executable, "-c", source])
    until = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < until
        time.sleep(0.01)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    left = psutil.Process(int(file.read_text()))
    left.wait(10)


def test_a_module_in_the_current_folder_is_not_taken_for_a_library(child, tmp_path, monkeypatch):
    place = tmp_path / "data"
    place.mkdir()
    (place / "psutil.py").write_text("raise SystemExit('planted')")
    monkeypatch.chdir(place)
    assert child.ask(1)[0] == 1
