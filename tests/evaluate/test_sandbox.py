"""Programs that mean harm do none. Every one of these runs behind walls that a first test has seen hold."""

import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
from copy import copy
from pathlib import Path

import psutil
import pytest

from sorsa_ds.evaluate.sandbox import runner, walls
from sorsa_ds.evaluate.sandbox.runner import Limits, Sandbox
from sorsa_ds.evaluate.tasks.humaneval import code_of, program
from tests.helpers import small_data
from tests.helpers.sandboxes import sandbox_or_skip

SHORT = Limits(seconds=15, cpu_seconds=1)
BRIEF = Limits(seconds=2, cpu_seconds=1)  # for what uses no time of its own, or that of many processes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_is_left")]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("x = 1", "passed"),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "left early"),
        ("import os; os._exit(9)", "left early"),
        ("import os; os._exit(137)", "left early"),
        ("import os; os.kill(os.getpid(), 11)", "signal 11"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("import os; os.abort()", "signal 6"),
        ("while True: pass", "timeout"),
        ("import signal; [signal.signal(s, signal.SIG_IGN) for s in (15, 2, 24)]\nwhile True: pass", "timeout"),
        ("x = 'x' * 10**10", "MemoryError"),
        ("open('big', 'wb').write(bytes(10**8))", "OSError"),
        ("print('hello'); import sys; sys.stdin.read()", "passed"),
        ("\ud800", "SyntaxError"),
        ("raise type('passed', (Exception,), {})()", None),
    ],
)
def test_how_a_program_ended_is_told(sandbox, source, told):
    ended = sandbox.run(source, SHORT)
    if told is not None:
        assert ended == told


def test_a_program_that_only_waits_is_ended(sandbox):
    assert sandbox.run("import time; time.sleep(60)", BRIEF) == "timeout"


def test_a_program_that_leaves_with_a_good_exit_code_has_not_passed(sandbox):
    assert sandbox.run("import os; os._exit(0)", SHORT) != "passed"
    assert sandbox.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", SHORT) != "passed"


def test_a_program_is_a_module_that_is_imported(sandbox):
    source = """
from __future__ import annotations
import dataclasses, pickle, sys, typing
if __name__ == "__main__":
    raise RuntimeError("a demonstration")
@dataclasses.dataclass
class Point:
    x: int
    rest: typing.ClassVar[Point | None] = None
assert [field.name for field in dataclasses.fields(Point)] == ["x"]
assert typing.get_type_hints(Point)["x"] is int
assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
assert sys.modules[__name__].Point is Point
"""
    assert sandbox.run(source, SHORT) == "passed"


def test_a_fork_bomb_is_bounded_and_ends(sandbox):
    assert sandbox.run("import os\nwhile True: os.fork()", BRIEF) in ("BlockingIOError", "timeout", "PermissionError")
    bomb = "import os\nwhile True:\n try:\n  os.fork()\n  os.setsid()\n except OSError: pass"
    assert sandbox.run(bomb, BRIEF) == "timeout"


def test_a_child_that_leaves_its_session_does_not_survive(sandbox):
    source = (
        "import os, time\n"
        "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  time.sleep(600)\n os._exit(0)\n"
        "os.wait()"
    )
    assert sandbox.run(source, SHORT) == "passed"


def test_who_guards_itself_by_stopping_all_others_does_not_survive(sandbox):
    source = """
import os
parent = os.getpid()
if os.fork() == 0:
    os.setsid()
    while os.getppid() == parent:
        pass
    while True:
        try: os.kill(-1, 19)
        except OSError: pass
"""
    assert sandbox.run(source, SHORT) == "passed"


def test_who_kills_a_users_processes_cannot_be_stopped_by_them():
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    program, killer = 59998, 59999
    source = "import os, sys\ntry: os.kill(int(sys.argv[1]), 0)\nexcept PermissionError: print('no')"
    holds, release = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            walls.become_killer(program, killer)
            os.write(tell, b".")
            os.read(holds, 1)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.read(told, 1)
    asked = ["/usr/bin/python3", "-c", source, str(child)]
    attempt = subprocess.run(asked, user=program, group=program, text=True, capture_output=True, check=False)
    target = subprocess.Popen(["sleep", "60"], user=program)
    os.write(release, b".")
    os.waitpid(child, 0)
    assert attempt.stdout == "no\n", attempt.stderr
    assert target.wait() == -signal.SIGKILL


def test_gigabytes_of_output_go_nowhere(sandbox):
    before = psutil.Process().memory_info().rss
    assert sandbox.run("import sys\nwhile True: sys.stdout.write('x' * 10**6)", SHORT) == "timeout"
    assert sandbox.run("import os\nwhile True: os.write(3, b'x' * 10**6)", BRIEF) != "passed"
    assert psutil.Process().memory_info().rss - before < 2**27


def test_files_outside_can_be_neither_deleted_nor_written(sandbox, tmp_path):
    treasure = tmp_path / "treasure"
    treasure.write_text("gold")
    for folder in [tmp_path, *tmp_path.parents][:4]:
        if folder.stat().st_uid == os.geteuid():  # an ordinary user cannot, and need not, open /tmp
            folder.chmod(folder.stat().st_mode | 0o055)  # the program may look for it
    attempt = f"""
import os, shutil
for path in ({str(treasure)!r}, {str(tmp_path)!r}, {str(Path(__file__))!r}, os.__file__, '/etc/hostname'):
    for harm in (os.remove, shutil.rmtree, lambda p: open(p, 'w'), lambda p: os.rename(p, p + 'x'), os.rmdir):
        try:
            harm(path)
        except OSError:
            pass
        else:
            raise KeyError(path)
shutil.rmtree({str(tmp_path)!r}, ignore_errors=True)
"""
    stamp = os.stat(os.__file__).st_mtime_ns
    assert sandbox.run(attempt, SHORT) == "passed"
    assert treasure.read_text() == "gold"
    assert os.stat(os.__file__).st_mtime_ns == stamp


def test_its_own_folder_is_writable_and_gone_afterwards(sandbox):
    source = (
        "import os, tempfile\nopen('here', 'w').write('x')\nassert open('here').read() == 'x'\n"
        "assert tempfile.mkdtemp()"
    )
    assert sandbox.run(source, SHORT) == "passed"
    assert sandbox.run("import os\nassert not os.path.exists('here')", SHORT) == "passed"


def test_what_it_leaves_where_all_may_write_is_gone(sandbox):
    places, name = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock"), f"left-by-{os.getpid()}"
    source = f"""
import os
written = 0
for place in {places}:
    try:
        os.makedirs(f"{{place}}/{name}/in/side")
        open(f"{{place}}/{name}/in/file", "w").close()
        os.chmod(f"{{place}}/{name}", 0)
        open(f"{{place}}/{name}-file", "w").close()
        written += 1
    except OSError:
        pass
assert written == {sum(map(os.path.isdir, places)) if sandbox.walls == "user" else 0}
"""
    assert sandbox.run(source, SHORT) == "passed"
    assert not [left for place in places for left in Path(place).glob(f"{name}*")]


def test_folders_of_any_depth_are_removed(sandbox, monkeypatch):
    place = tempfile.mkdtemp()
    monkeypatch.setattr(tempfile, "tempdir", place)
    try:
        source = "import os\nfor _ in range(2000):\n os.mkdir('a')\n os.chdir('a')"
        assert sandbox.run(source, SHORT) == "passed"
        assert not os.listdir(place)
    finally:
        subprocess.run(["rm", "-rf", place], check=True)  # pytest's own cleaning would stumble


def test_no_other_process_can_be_killed(sandbox):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        source = f"""
import os
for pid in ({bystander.pid}, {os.getpid()}, os.getppid()):
    try:
        os.kill(pid, 9)
    except OSError:
        pass
    else:
        assert pid == 1 == os.getppid()  # the first process of its own namespace, which heeds no signal
"""
        assert sandbox.run(source, SHORT) == "passed"
        assert sandbox.run("import os; os.kill(-1, 9)", SHORT) != "not started"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


SIGNALS_TO_OTHERS = """
import os, signal
for number in sorted(signal.valid_signals()):
    for target in (1, os.getppid()):
        try:
            os.kill(target, number)
        except PermissionError:
            pass
"""
SIGNALS_TO_THE_GROUP = """
import os, signal
for number in sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}):
    signal.signal(number, signal.SIG_IGN)
    os.kill(0, number)
"""
FILES_OF_THE_FIRST_PROCESS = """
import os
for path in ("/proc/1/fd", "/proc/1/map_files", "/proc/1/task/1/fd"):
    try:
        os.listdir(path)
    except (PermissionError, FileNotFoundError):
        continue
    raise AssertionError(path)
for name in ("oom_score_adj", "comm", "mem", "coredump_filter", "sched"):
    try:
        os.close(os.open(f"/proc/1/{name}", os.O_WRONLY))
    except (PermissionError, FileNotFoundError):
        continue
    raise AssertionError(name)
"""


def test_no_signal_ends_more_than_the_program_that_sends_it(sandbox):
    """In namespaces the walls' own process is the program's parent, pid 1 and a member of its process group."""
    assert sandbox.run(SIGNALS_TO_OTHERS, SHORT) == "passed"
    assert sandbox.run(SIGNALS_TO_THE_GROUP, SHORT) == "passed"
    assert sandbox.run("import os; os.kill(0, 2)", SHORT) == "KeyboardInterrupt"
    assert sandbox.run("import os; os.kill(0, 9)", SHORT) == "signal 9"
    assert sandbox.run("import os; os.kill(0, 19)", BRIEF) == "timeout"


def test_the_files_of_the_first_process_are_closed(sandbox):
    assert sandbox.run(FILES_OF_THE_FIRST_PROCESS, SHORT) == "passed"


def test_there_is_no_network_and_no_root(sandbox):
    source = """
import ctypes, os, socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, 16, 17):
    try:
        socket.socket(family, socket.SOCK_RAW if family == 17 else socket.SOCK_STREAM)
    except OSError:
        pass
    else:
        raise AssertionError(family)
libc = ctypes.CDLL(None)
assert libc.setuid(0) == -1 and os.getuid() != 0
"""
    assert sandbox.run(source, SHORT) == "passed"


def test_the_environment_holds_no_secret(sandbox, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    source = (
        "import glob, os\nassert 'HF_TOKEN' not in os.environ\n"
        "for file in glob.glob('/proc/[0-9]*/environ'):\n"
        "  try: assert b'secret' not in open(file, 'rb').read(), file\n"
        "  except OSError: pass"
    )
    assert sandbox.run(source, SHORT) == "passed"


def test_behind_namespaces_the_machines_files_cannot_even_be_seen(tmp_path):
    """The program walks its whole file system: all it finds is what is mounted there, and the way to it."""
    system = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
    devices = ("/dev/null", "/dev/zero", "/dev/urandom")
    interpreter = {place for prefix in (sys.prefix, sys.base_prefix) for place in (prefix, os.path.realpath(prefix))}
    mounted = {*system, *devices, "/proc", "/sandbox", *interpreter}
    neighbour = Path(sys.prefix).parent
    hidden = [str(path) for path in (tmp_path, Path(__file__)) if not any(map(path.is_relative_to, mounted))]
    source = f"""
import os
mounted = {mounted}
def walk(folder):
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if path not in mounted:
            assert any(place.startswith(path + "/") for place in mounted), path
            walk(path)
walk("/")
for path in {hidden}:
    assert not os.path.lexists(path), path
for folder in {[str(neighbour), "/"]}:
    try:
        open(os.path.join(folder, "written"), "w")
    except OSError:
        continue
    raise AssertionError(folder)
"""
    assert sandbox_or_skip("namespaces").run(source, SHORT) == "passed"


def test_an_environment_behind_a_symbolic_link_can_be_used(tmp_path):
    """The interpreter lies in another folder, like uv's interpreters and an environment on another disk."""
    sandbox_or_skip("namespaces")
    for target in (sys.prefix, os.path.relpath(sys.prefix, tmp_path)):
        link = tmp_path / f"a link to {'an absolute' if os.path.isabs(target) else 'a relative'} path"
        link.symlink_to(target)
        sandbox = Sandbox("namespaces", str(link / "bin" / Path(sys.executable).name), (sys.base_prefix, str(link)))
        assert sandbox.run("x = 1", SHORT) == "passed"


def test_an_ordinary_user_is_walled_in_too(tmp_path_factory):
    """Root runs this as another user, with the system's interpreter and a copy of the sandbox that it may read."""
    if os.geteuid() != 0 or not Path("/usr/bin/python3").exists():
        pytest.skip("needs root, to become another user, and a system interpreter")
    script = (
        "import json, os\n"
        "from sorsa_ds.evaluate.sandbox.runner import Limits, Sandbox\n"
        "try:\n sandbox = Sandbox()\nexcept ValueError as error:\n raise SystemExit(f'refused: {error}')\n"
        "assert sandbox.walls == 'namespaces'\n"
        "assert sandbox.run('x = 1') == 'passed'\n"
        "assert sandbox.run('import os\\nwhile True: os.fork()', Limits(seconds=5, cpu_seconds=1)) != 'passed'\n"
        "assert sandbox.run('import os, socket\\nos.kill(os.getppid(), 9)\\nsocket.socket()') == 'PermissionError'\n"
        "for source in json.loads(os.environ['HARMLESS']):\n"
        " told = sandbox.run(source)\n"
        " assert told == 'passed', (told, source)\n"
        "for harm in ('os.remove', 'open'):\n"
        " extra = ', \"w\"' if harm == 'open' else ''\n"
        " told = sandbox.run(f'import os\\n{harm}({os.environ[\"OWN\"]!r}{extra})')\n"
        " assert told == 'FileNotFoundError', told\n"
        "print('walled in')\n"
    )
    import shutil
    import tempfile

    place = Path(tempfile.mkdtemp(prefix="sandbox-user-"))
    try:
        shutil.copytree(Path(__file__).parents[2] / "sorsa_ds", place / "sorsa_ds")
        own = place / "own"
        own.write_text("mine")
        for path in [place, *place.rglob("*")]:
            os.chown(path, 12345, 12345)
        done = subprocess.run(
            ["/usr/bin/python3", "-c", script], user=12345, group=12345, extra_groups=[], text=True,
            capture_output=True, check=False, cwd="/",
            env={
                "PYTHONPATH": str(place), "OWN": str(own), "TMPDIR": str(place), "PATH": "/usr/bin:/bin",
                "HARMLESS": json.dumps([SIGNALS_TO_OTHERS, SIGNALS_TO_THE_GROUP, FILES_OF_THE_FIRST_PROCESS]),
            },
        )  # fmt: skip
        if "refused" in done.stderr:
            pytest.skip(done.stderr)
        assert "walled in" in done.stdout, done.stderr
        assert own.read_text() == "mine"
    finally:
        shutil.rmtree(place)


def test_where_no_wall_holds_nothing_is_run(monkeypatch):
    def fails(*_):
        raise RuntimeError("EPERM")

    monkeypatch.setattr(Sandbox, "run", fails)
    with pytest.raises(ValueError, match="none is run: namespaces: EPERM"):
        Sandbox()


def test_a_program_that_cannot_be_started_is_no_wrong_answer(sandbox):
    sandbox = copy(sandbox)
    sandbox._interpreter = {**sandbox._interpreter, "python": "/nowhere/python"}
    with pytest.raises(RuntimeError, match=r"could not be run: FileNotFoundError.*/nowhere/python"):
        sandbox.run("x = 1", SHORT)


def test_where_no_process_is_left_for_a_user_it_is_told_and_nothing_hangs(sandbox):
    full = Limits(processes=1)
    if sandbox.walls == "user":  # its one process is the program
        assert sandbox.run("import os; os.fork()", full) == "BlockingIOError"
    else:  # its one process would start the program
        with pytest.raises(RuntimeError, match="could not be run: BlockingIOError"):
            sandbox.run("x = 1", full)


def test_where_no_process_can_be_started_at_all_it_is_told(sandbox, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(runner.subprocess, "Popen", fails)
    with pytest.raises(RuntimeError, match="could not be run: .*temporarily unavailable"):
        sandbox.run("x = 1", SHORT)
    assert not list(tmp_path.iterdir())


def test_a_jail_that_does_not_end_is_not_waited_for_nor_who_holds_its_pipes(sandbox, tmp_path, monkeypatch):
    holder = tmp_path / "holder"
    (tmp_path / "jail.py").write_text(
        "import os, time\n"
        "if os.fork() == 0:\n"
        " os.setsid()\n"
        f" open({str(holder)!r}, 'w').write(str(os.getpid()))\n"
        " time.sleep(30)\n"
        " os._exit(0)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(runner, "_JAIL", tmp_path / "jail.py")
    monkeypatch.setattr(runner, "_SPARE_SECONDS", 1.0)
    assert sandbox.run("x = 1", Limits(seconds=1)) == "timeout"
    held_by = psutil.Process(int(holder.read_text()))
    assert held_by.status() != psutil.STATUS_ZOMBIE
    held_by.kill()


def test_an_interpreter_that_other_users_cannot_reach_is_named(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory() as closed:
        python = Path(closed) / "python"
        python.symlink_to(sys.executable)
        with pytest.raises(ValueError, match=rf"{python} cannot be read by other users, for {closed} is .*chmod o\+x"):
            Sandbox("user", str(python))


@pytest.mark.parametrize("origin", ["made", "real"])
def test_canonical_solutions_pass_and_empty_ones_do_not(origin, request, tmp_path):
    """Some of HumanEval's here; benchmarks/graders.py runs all."""
    sandbox = sandbox_or_skip("namespaces")
    folder = (
        small_data.humaneval(tmp_path) if origin == "made" else request.getfixturevalue("shared_data") / "humaneval"
    )
    with gzip.open(folder / "HumanEval.jsonl.gz") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows[:: max(1, len(rows) // 10)]:
        whole = f"Here it is:\n```python\n{row['prompt']}{row['canonical_solution']}\n```\nDone."
        for answer in (row["canonical_solution"], whole, row["prompt"] + row["canonical_solution"]):
            assert sandbox.run(program(row, code_of(row, answer))) == "passed", row["task_id"]
        assert sandbox.run(program(row, code_of(row, "    pass\n"))) != "passed", row["task_id"]
        assert sandbox.run(program(row, code_of(row, ""))) != "passed", row["task_id"]
