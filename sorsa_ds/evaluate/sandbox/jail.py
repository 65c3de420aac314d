"""Wall a program in, run it, and leave nothing of it behind: the trusted child between an evaluation and a program.

    python -I -S jail.py WALLS FOLDER SETTINGS < program

WALLS: `namespaces` or `user` (sorsa_ds.evaluate.sandbox.runner). FOLDER: an empty one, the new root or the working
folder. SETTINGS: JSON, the limits and where the interpreter is. Prints one line: `passed`,
`timeout`, or what ended the program.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # -I leaves it out
import walls  # noqa: E402

NOBODY = 65534
RESULT = 3  # the descriptor on which the program tells how it ended
WORK = "/sandbox"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")


def main() -> None:
    """Run one program."""
    kind, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    alone = kind == "namespaces"
    reads, writes = os.pipe()
    if alone:
        _own_namespaces()
    else:
        walls.adopt_orphans()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writes, RESULT)
            _become_program(alone, folder, settings)
        except BaseException as error:
            os.write(RESULT, f"not started ({type(error).__name__}: {error})\n".encode())
            os._exit(1)
    os.close(writes)
    status = _wait(child, settings["seconds"])
    os.set_blocking(reads, False)
    try:
        told = os.read(reads, 1000).decode(errors="replace").partition("\n")[0]
    except BlockingIOError:
        told = ""
    if not alone:
        _end_descendants()
    print(_outcome(status, told))


def _own_namespaces() -> None:
    flags = walls.NEWNS | walls.NEWPID | walls.NEWNET | walls.NEWIPC | walls.NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    walls.unshare(flags if uid == 0 else flags | walls.NEWUSER)
    if uid != 0:
        walls.map_user(uid, gid)


def _become_program(alone: bool, folder: Path, settings: dict) -> None:
    """Give up every right and become the interpreter that executes the program."""
    source = (HERE / "program.py").read_text()
    was_root = os.geteuid() == 0
    work = str(folder)
    if alone:
        work = WORK
        visible = [Path(path) for path in (*_SYSTEM, *settings["prefixes"]) if os.path.lexists(path)]
        walls.new_root(folder, visible, WORK, settings["work_bytes"])
    os.chdir(work)
    os.setsid()
    nothing = os.open("/dev/null", os.O_WRONLY)
    for target in (1, 2):
        os.dup2(nothing, target)
    os.closerange(RESULT + 1, 256)
    if was_root:
        walls.drop_to(NOBODY, NOBODY)
        if alone:
            walls.unshare(walls.NEWUSER)  # its processes are counted there, not with all of that user's
    for name in ("CPU", "AS", "FSIZE", "NPROC", "NOFILE", "CORE"):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (settings[name], settings[name]))
    walls.no_new_rights()
    walls.deny_sockets()
    walls.end_with_parent()
    environment = {**os.environ, "HOME": work, "TMPDIR": work}
    os.execve(settings["python"], [settings["python"], "-I", "-c", source], environment)


def _wait(child: int, seconds: float) -> int | None:
    """The exit status; None where it took too long and was killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _outcome(status: int | None, told: str) -> str:
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "timeout"
    if os.WIFSIGNALED(status):
        return "timeout" if not told and os.WTERMSIG(status) == signal.SIGKILL else f"signal {os.WTERMSIG(status)}"
    return told or "left early"


def _end_descendants() -> None:
    """Kill whatever the program has started, until nothing is left."""
    for _ in range(1000):
        children = [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
        if not children:
            return
        for child in children:  # theirs become ours when they die
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)


main()
