"""Wall a program in, run it, and leave nothing of it behind: the trusted child between an evaluation and a program.

    python -I -S jail.py WALLS FOLDER SETTINGS < program

WALLS is `namespaces` or `user` (sorsa_ds.evaluate.sandbox.runner). FOLDER is an empty folder: the new root, or the
working folder. SETTINGS is JSON: the limits, and where the interpreter is. One line is printed: `passed`, `timeout`, or
what ended the program. Where a wall could not be put up the program is not started: nothing is printed, and the exit
code is 1.
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
sys.path.insert(0, str(HERE))  # python -I does not put a script's folder on the path
import seccomp  # noqa: E402
import walls  # noqa: E402

RESULT = 3  # the file descriptor on which the program tells how it ended
WORK = "/sandbox"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_UIDS = range(60000, 65000, 2)  # programs get the even ones; the odd ones are for the processes that kill them
_OPEN_TO_ALL = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")
_DEATH_SECONDS = 10.0  # for killed processes to be gone


def main() -> None:
    """Run one program, and print how it ended."""
    kind, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    alone = kind == "namespaces"
    uid = _unused_uid() if os.geteuid() == 0 else None
    reads, writes = os.pipe()
    complaints, complain = os.pipe()  # becoming the program closes it, so that only this file's code can write there
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
        assert uid is not None, "the walls `user` are for root alone"
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
    """Give up every right, and every file descriptor above RESULT except `last`.

    Where this process is root it becomes the user `uid`.
    """
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
            walls.unshare(walls.NEWUSER)  # its processes are counted there, apart from others of the same user
    for name in ("CPU", "AS", "FSIZE", "NPROC", "NOFILE", "CORE"):
        spared = 1 if name == "CPU" else 0  # at the limit comes SIGXCPU; what that does not end gets SIGKILL
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (settings[name], settings[name] + spared))
    walls.close_proc_entry()
    walls.no_new_rights()
    walls.filter_calls(seccomp.instructions())
    walls.end_with_parent()
    os.setsid()  # as the last step: until here it dies with the jail's process group, from here on with the jail


def _be_init() -> None:
    """Fork, return in the child, and wait for it: this is the first process of a PID namespace.

    The kernel keeps from such a process every signal, even SIGKILL, that comes from inside its namespace and that it
    does not handle. It therefore handles none: Python's own handler of SIGINT would end it, and the evaluation with it.
    The exit code is the signal that ended the child, or 0.
    """
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        return
    while True:
        ended, status = os.wait()
        if ended == child:  # when this process leaves, the kernel kills everything else in the namespace
            os._exit(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)


def _become_program(settings: dict) -> None:
    """Become the interpreter that executes the program."""
    os.execve(settings["python"], [settings["python"], "-I", "-c", settings["source"]], os.environ)


def _wait(child: int, settings: dict, alone: bool) -> int | None:
    """The signal that ended the program, 0 where none did; None where it ran too long or took too much CPU time."""
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
    """The text that is in a pipe now, at most 1,000 bytes."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 1000).decode(errors="replace")
    except BlockingIOError:
        return ""


def _unused_uid() -> int:
    """The id of a user without a name and without a process.

    The next id is unused too; the process that kills leftovers runs under it.
    """
    taken = {user.pw_uid for user in pwd.getpwall()} | _users_at_work()
    # Jails and containers that start at the same time begin their search at different ids.
    start = os.getpid() + zlib.crc32(os.uname().nodename.encode())
    turns = (_UIDS[(start + step) % len(_UIDS)] for step in range(len(_UIDS)))
    return next(uid for uid in turns if not {uid, uid + 1} & taken)


def _users_at_work() -> set[int]:
    """The users of all processes."""
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the process has ended meanwhile
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
            while os.waitpid(-1, os.WNOHANG) != (0, 0):  # orphans have become children of this process
                pass


def _remove_all_of(uid: int) -> None:
    """Remove the files that a user has left in folders that everybody may write into."""
    left = []
    for place in filter(os.path.isdir, _OPEN_TO_ALL):
        for entry in os.scandir(place):
            with suppress(FileNotFoundError):  # files of others come and go
                if entry.stat(follow_symlinks=False).st_uid == uid:
                    left.append(entry.path)
    for start in range(0, len(left), 1000):
        subprocess.run(["rm", "-rf", "--", *left[start : start + 1000]], check=True)


if __name__ == "__main__":
    main()
