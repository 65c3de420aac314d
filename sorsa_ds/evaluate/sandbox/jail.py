"""Wall a program in, run it, and leave nothing of it behind: the trusted child between an evaluation and a program.

    python -I -S jail.py WALLS FOLDER SETTINGS < program

WALLS: `namespaces` or `user` (sorsa_ds.evaluate.sandbox.runner). FOLDER: an empty one, the new root or the working
folder. SETTINGS: JSON, the limits and where the interpreter is. Prints one line: `passed`, `timeout`, or what ended the
program. Ends with exit code 1, and prints nothing, where a wall could not be put up: the program was not started.
"""

import json
import os
import pwd
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # -I leaves it out
import walls  # noqa: E402

RESULT = 3  # the descriptor on which the program tells how it ended
WORK = "/sandbox"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_UIDS = range(60000, 65000)


def main() -> None:
    """Run one program."""
    kind, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    alone = kind == "namespaces"
    uid = _unused_uid() if os.geteuid() == 0 else None
    reads, writes = os.pipe()
    complaints, complain = os.pipe()  # becoming the program closes it: what comes here comes from this file
    if alone:
        _own_namespaces()
    else:
        walls.adopt_orphans()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writes, RESULT)
            _wall_in(alone, folder, uid, settings, complain)
            if alone:
                _be_init()
            _become_program(settings)
        except BaseException as error:
            os.write(complain, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
    os.close(writes)
    os.close(complain)
    status = _wait(child, settings["seconds"])
    told, complaint = _read(reads).partition("\n")[0], _read(complaints)
    if not alone:
        _end_all_of(uid)
    if complaint:
        sys.exit(complaint)
    print(_outcome(status, told))


def _own_namespaces() -> None:
    flags = walls.NEWNS | walls.NEWPID | walls.NEWNET | walls.NEWIPC | walls.NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    walls.unshare(flags if uid == 0 else flags | walls.NEWUSER)
    if uid != 0:
        walls.map_user(uid, gid)


def _wall_in(alone: bool, folder: Path, uid: int | None, settings: dict, last: int) -> None:
    """Give up every right, and every descriptor behind RESULT but `last`. uid: whom to become, where this is root."""
    work = str(folder)
    if alone:
        work = WORK
        visible = [Path(path) for path in (*_SYSTEM, *settings["prefixes"]) if os.path.lexists(path)]
        walls.new_root(folder, visible, WORK, settings["work_bytes"])
    elif uid is not None:
        os.chown(work, uid, uid)
    os.chdir(work)
    os.environ.update(HOME=work, TMPDIR=work)
    os.setsid()
    nothing = os.open("/dev/null", os.O_WRONLY)
    for target in (1, 2):
        os.dup2(nothing, target)
    os.closerange(RESULT + 1, last)
    os.closerange(last + 1, 256)
    if uid is not None:
        walls.drop_to(uid, uid)
        if alone:
            walls.unshare(walls.NEWUSER)  # its processes are counted there, not with all of that user's
    for name in ("CPU", "AS", "FSIZE", "NPROC", "NOFILE", "CORE"):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (settings[name], settings[name]))
    walls.no_new_rights()
    walls.deny_sockets()
    walls.end_with_parent()


def _be_init() -> None:
    """Return in a child, and wait for it: the first process of a PID namespace, which this is, takes no signals."""
    child = os.fork()
    if child == 0:
        return
    while True:
        ended, status = os.wait()
        if ended == child:  # leaving kills all that is left in the namespace
            os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)


def _become_program(settings: dict) -> None:
    """Become the interpreter that executes the program."""
    os.execve(settings["python"], [settings["python"], "-I", "-c", settings["source"]], os.environ)


def _wait(child: int, seconds: float) -> int | None:
    """The exit code, a signal's number above 128; None where it took too long and was killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _read(pipe: int) -> str:
    """What is in a pipe now, at most 1,000 bytes."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 1000).decode(errors="replace")
    except BlockingIOError:
        return ""


def _outcome(code: int | None, told: str) -> str:
    if code is None or code - 128 in (signal.SIGXCPU, signal.SIGKILL):
        return "timeout"
    return told or (f"signal {code - 128}" if code > 128 else "left early")


def _unused_uid() -> int:
    """A user whom nobody is: without a name, and without a process."""
    taken = {user.pw_uid for user in pwd.getpwall()} | _users_at_work()
    start = os.getpid()  # two jails that choose at once choose differently
    return next(uid for uid in (_UIDS[(start + step) % len(_UIDS)] for step in range(len(_UIDS))) if uid not in taken)


def _users_at_work() -> set[int]:
    """The users of all processes."""
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if entry.name.isdigit():
                found.add(entry.stat().st_uid)
    return found


def _end_all_of(uid: int) -> None:
    """Kill every process of a user at once, so that none can fork away, and see that none is left."""
    for _ in range(100):
        killer = os.fork()
        if killer == 0:
            walls.drop_to(uid, uid)
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
            os._exit(0)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):  # orphans are this process's own
                pass
        time.sleep(0.01)
        if uid not in _users_at_work():
            return


main()
