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
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # -I leaves it out
import seccomp  # noqa: E402
import walls  # noqa: E402

RESULT = 3  # the descriptor on which the program tells how it ended
WORK = "/sandbox"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_UIDS = range(60000, 65000, 2)  # the odd ones are their killers
_OPEN_TO_ALL = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")
_DEATH_SECONDS = 10.0  # of what has been killed


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
    ended_by = _wait(child, settings, alone)
    told, complaint = _read(reads).partition("\n")[0], _read(complaints)
    if not alone:
        _end_all_of(uid)
        _remove_all_of(uid)
    if complaint:
        sys.exit(complaint)
    print("timeout" if ended_by is None else told or (f"signal {ended_by}" if ended_by else "left early"))


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
        # Where an environment is a symbolic link, the folder that it points to must be there as well, and first.
        prefixes = [place for prefix in settings["prefixes"] for place in (os.path.realpath(prefix), prefix)]
        visible = [Path(path) for path in (*_SYSTEM, *prefixes) if os.path.lexists(path)]
        walls.new_root(folder, visible, WORK, settings["work_bytes"])
    elif uid is not None:
        os.chown(work, uid, uid)
    os.chdir(work)
    os.environ.update(HOME=work, TMPDIR=work)
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
        spared = 1 if name == "CPU" else 0  # SIGXCPU at the limit, SIGKILL for whom that does not end
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (settings[name], settings[name] + spared))
    walls.no_new_rights()
    walls.filter_calls(seccomp.instructions())
    walls.end_with_parent()
    os.setsid()  # last: until here it dies with the jail's group, from here on with the jail


def _be_init() -> None:
    """Return in a child, and wait for it: the first process of a PID namespace, which this is, takes no signals.

    Its exit code is the signal that ended the child, or 0.
    """
    child = os.fork()
    if child == 0:
        return
    while True:
        ended, status = os.wait()
        if ended == child:  # leaving kills all that is left in the namespace
            os._exit(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)


def _become_program(settings: dict) -> None:
    """Become the interpreter that executes the program."""
    os.execve(settings["python"], [settings["python"], "-I", "-c", settings["source"]], os.environ)


def _wait(child: int, settings: dict, alone: bool) -> int | None:
    """The signal that ended the program, 0 where none did; None where it took too long, by the clock or of the CPU."""
    until = time.monotonic() + settings["seconds"]
    while time.monotonic() < until:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            told_by_init = os.WEXITSTATUS(status) if alone else 0
            ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else told_by_init
            spent = used.ru_utime + used.ru_stime >= settings["CPU"]
            return None if ended_by == signal.SIGXCPU or (ended_by == signal.SIGKILL and spent) else ended_by
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


def _unused_uid() -> int:
    """A user whom nobody is, without a name and without a process; nor is anybody the next."""
    taken = {user.pw_uid for user in pwd.getpwall()} | _users_at_work()
    start = os.getpid() + zlib.crc32(os.uname().nodename.encode())  # jails, and containers, at once choose differently
    turns = (_UIDS[(start + step) % len(_UIDS)] for step in range(len(_UIDS)))
    return next(uid for uid in turns if not {uid, uid + 1} & taken)


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
    until = time.monotonic() + _DEATH_SECONDS
    while uid in _users_at_work():
        if time.monotonic() > until:
            sys.exit("a process of the program does not end")
        killer = os.fork()
        if killer == 0:
            try:
                walls.become_killer(uid, uid + 1)
                os.kill(-1, signal.SIGKILL)
            finally:
                os._exit(0)
        os.waitpid(killer, 0)
        time.sleep(0.002)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):  # orphans are this process's own
                pass


def _remove_all_of(uid: int) -> None:
    """Remove what a user has left where all may write."""
    left = []
    for place in filter(os.path.isdir, _OPEN_TO_ALL):
        for entry in os.scandir(place):
            with suppress(FileNotFoundError):  # others' come and go
                if entry.stat(follow_symlinks=False).st_uid == uid:
                    left.append(entry.path)
    for start in range(0, len(left), 1000):
        subprocess.run(["rm", "-rf", "--", *left[start : start + 1000]], check=True)


main()
