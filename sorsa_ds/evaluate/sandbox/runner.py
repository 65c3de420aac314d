"""Run untrusted programs, one at a time, behind the strongest walls that this machine permits; or refuse to."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Walls = Literal["namespaces", "user"]

PROTECTION = {
    "namespaces": "Programs run in namespaces of their own, as an ordinary user: they see an interpreter, read-only, "
                  "an empty folder, no process but their own, and no network.",
    "user": "Programs run as a user of their own, for this machine permits no namespaces: they cannot open sockets, "
            "touch other users' processes or write their files, but read what is readable to all and write into /tmp.",
}  # fmt: skip
_JAIL = Path(__file__).with_name("jail.py")
_SPARE_SECONDS = 60.0  # for the walls, beyond a program's own

_PROBE = """
import os, socket
assert os.getuid() != 0 or os.geteuid() != 0
open("written", "w").write("here")
try:
    socket.socket()
except OSError:
    pass
else:
    raise AssertionError("a socket")
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program. seconds: wall clock. cpu_seconds, memory_bytes, file_bytes: of each of its processes.
    work_bytes: of all files that it writes, behind `namespaces`."""

    seconds: float = 20.0
    cpu_seconds: int = 5
    memory_bytes: int = 2**29
    file_bytes: int = 2**24
    work_bytes: int = 2**25
    processes: int = 8

    def as_settings(self) -> dict:
        """As the jail takes them."""
        return {
            "seconds": self.seconds, "work_bytes": self.work_bytes, "CPU": self.cpu_seconds, "AS": self.memory_bytes,
            "FSIZE": self.file_bytes, "NPROC": self.processes, "NOFILE": 64, "CORE": 0,
        }  # fmt: skip


class Sandbox:
    """Runs programs behind one kind of walls.

    Args:
        walls: which; None: the strongest that holds here.
        python: the interpreter that executes the programs.
        prefixes: folders that it needs.

    Raises:
        ValueError: none holds: not even programs that mean well can be run here without risk.
    """

    def __init__(
        self,
        walls: Walls | None = None,
        python: str = sys.executable,
        prefixes: tuple[str, ...] = (sys.base_prefix, sys.prefix),
    ):
        source = Path(__file__).with_name("program.py").read_text(encoding="utf-8")
        self._interpreter = {"python": python, "prefixes": prefixes, "source": source}
        reasons = {}
        for candidate in (walls,) if walls else ("namespaces", "user"):
            if candidate == "user" and os.geteuid() != 0:
                reasons[candidate] = "only root can become another user"
                continue
            self.walls = candidate
            try:
                reasons[candidate] = self.run(_PROBE)
            except RuntimeError as error:
                reasons[candidate] = str(error)
            if reasons[candidate] == "passed":
                return
            if candidate == "user" and (barrier := _barrier((python, *prefixes))):
                reasons[candidate] = (
                    f"the Python interpreter {python} cannot be read by other users, for {barrier} is closed to them "
                    f"(chmod o+x {barrier}, or use a Python that lies elsewhere, as in /usr or /opt)"
                )
        raise ValueError(
            "--allow_code_execution: programs cannot be walled in on this machine, so none is run: "
            + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            + ". Permit user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0, or "
            "user.max_user_namespaces above 0), or run the evaluation as root in a container"
        )

    @property
    def protection(self) -> str:
        """What the walls keep out, in a sentence."""
        return PROTECTION[self.walls]

    def run(self, program: str, limits: Limits = Limits()) -> str:
        """`passed`, `timeout`, or what ended the program: an exception's name, a signal, or that it left early.

        Nothing that it has started is alive afterwards, and its files are gone.

        Raises:
            RuntimeError: it was not started, or does not end; a wall could not be put up.
        """
        folder = tempfile.mkdtemp(prefix="sandbox-")
        settings = json.dumps({**limits.as_settings(), **self._interpreter})
        command = [sys.executable, "-I", "-S", str(_JAIL), self.walls, folder, settings]
        try:
            return _told_by(command, program.encode(errors="replace"), limits.seconds + _SPARE_SECONDS)
        finally:
            _remove(folder)


def _told_by(command: list[str], program: bytes, seconds: float) -> str:
    """What a jail prints; `timeout` where it had to be killed. Waits for nothing but the jail, and for it no longer."""
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        jail = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
            cwd="/", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise RuntimeError(f"a program could not be run: {error}") from error
    try:
        told, complaint = jail.communicate(program, timeout=seconds)
    except subprocess.TimeoutExpired:  # the jail keeps the time; only a machine at a standstill comes here
        told, complaint = b"timeout", b""
    finally:
        with suppress(ProcessLookupError):
            os.killpg(jail.pid, signal.SIGKILL)
        for pipe in (jail.stdin, jail.stdout, jail.stderr):
            pipe.close()  # unread: somebody else may hold its other end
        with suppress(subprocess.TimeoutExpired):
            jail.wait(_SPARE_SECONDS)
    if jail.returncode != 0 and told != b"timeout":
        raise RuntimeError(f"a program could not be run: {complaint.decode(errors='replace').strip()[-300:]}")
    return told.decode().strip()


def _remove(folder: str) -> None:
    """Remove a folder, as far as that goes: of any depth, which shutil's functions are not for."""
    with suppress(OSError, subprocess.TimeoutExpired):
        if os.listdir(folder):
            subprocess.run(["rm", "-rf", "--", folder], timeout=_SPARE_SECONDS, check=False)
        else:
            os.rmdir(folder)


def _barrier(paths: tuple[str, ...]) -> Path | None:
    """What keeps other users from one of these files and folders: the first on the way to it that is closed to them."""
    for path in paths:
        for way in (Path(path).absolute(), Path(path).resolve()):
            for place in (*reversed(way.parents), way):
                if place.exists() and not place.stat().st_mode & stat.S_IXOTH:
                    return place
    return None
