"""What is printed: text of others commands no terminal, and a reader who leaves ends no command."""

import os
import subprocess
import sys
import unicodedata

import pytest

from sorsa_ds.runtime.console import note, printable, say

HOSTILE = "\x1b[31mred\x07\x9b2J\x7f\r\u202egnp.exe\u2066\x00\ud800"
HARMLESS = r"\x1b[31mred\x07\x9b2J\x7f\r\u202egnp.exe\u2066\x00\ud800"


def test_control_characters_are_escaped_and_everything_else_is_kept():
    assert printable(HOSTILE) == HARMLESS
    kept = "Ünï — 日本 🙂👩‍👩‍👧\n\t#### 1,234 \\x1b"
    assert printable(kept) == kept
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    left = {char for char in printable(everything) if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")}
    assert left == {"\n", "\t"}
    directions = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    assert not any(unicodedata.bidirectional(char) in directions for char in printable(everything))


def test_what_is_said_and_noted_is_escaped(capsys):
    say(HOSTILE)
    note(HOSTILE)
    assert capsys.readouterr() == (f"{HARMLESS}\n", f"[rank 0] {HARMLESS}\n")


def run(body: str, **streams) -> subprocess.CompletedProcess[str]:
    """Run a command of one line, as launch/ starts commands."""
    source = f"import sys\nfrom sorsa_ds.runtime import exit_codes\nexit_codes.run(lambda: {body})"
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run([sys.executable, "-c", source], text=True, check=False, **given)


@pytest.fixture
def unread():
    """The writing end of a pipe that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    yield writes
    os.close(writes)


@pytest.mark.slow
def test_what_ends_a_command_is_escaped():
    for raised, code in (("ValueError", 2), ("RuntimeError", 1)):
        done = run(f"(_ for _ in ()).throw({raised}({HOSTILE!r}))")
        assert done.returncode == code
        assert HARMLESS in done.stderr
        assert "\x1b" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("body", ["print('line\\n' * 10**5)", "[print('line', flush=True) for _ in range(3)]"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_outlives_its_readers(unread, body, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    end = "print('the end', file=sys.stderr)"
    done = run(f"({body}, {end})", stdout=unread)
    assert (done.returncode, done.stderr) == (0, "the end\n")
    done = run(f"({body.replace(')', ', file=sys.stderr)', 1)}, print('the end'))", stderr=unread)
    assert (done.returncode, done.stdout) == (0, "the end\n")


@pytest.mark.slow
def test_a_command_without_streams_does_its_work(tmp_path):
    file = tmp_path / "file"
    source = f"from sorsa_ds.runtime import exit_codes; exit_codes.run(lambda: print(open({str(file)!r}, 'w')))"
    subprocess.run(f'{sys.executable} -c "{source}" >&- 2>&-', shell=True, check=True)
    assert file.exists()


@pytest.mark.slow
def test_a_full_disk_behind_stdout_is_told():
    with open("/dev/full", "w") as full:
        done = run("print('a line')", stdout=full)
    assert done.returncode == 2
    assert "cannot be written: No space left" in done.stderr
    assert "Traceback" not in done.stderr
