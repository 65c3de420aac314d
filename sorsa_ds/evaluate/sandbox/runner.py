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
_SPARE_SECONDS = 60.0  # for the walls, beyond the program's own time

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
    """The limits of one program.

    seconds: by the clock. cpu_seconds, memory_bytes, file_bytes (of one file): for each of its processes. work_bytes:
    of all its files together, behind the walls `namespaces`. processes: how many it may have at once.
    """

    seconds: float = 20.0
    cpu_seconds: int = 5
    memory_bytes: int = 2**29
    file_bytes: int = 2**24
    work_bytes: int = 2**25
    processes: int = 8

    def as_settings(self) -> dict:
        """The limits as the jail's settings name them."""
        return {
            "seconds": self.seconds, "work_bytes": self.work_bytes, "CPU": self.cpu_seconds, "AS": self.memory_bytes,
            "FSIZE": self.file_bytes, "NPROC": self.processes, "NOFILE": 64, "CORE": 0,
        }  # fmt: skip


class Sandbox:
    """Runs programs behind one kind of walls.

    Args:
        walls: the kind of walls; None: the strongest that holds on this machine.
        python: the interpreter that executes the programs.
        prefixes: the folders that the interpreter needs.

    Raises:
        ValueError: no walls hold, so that programs could not be run without risk.
    """

    def __init__(
        self,
        walls: Walls | None = None,
        python: str = sys.executable,
        prefixes: tuple[str, ...] = (sys.base_prefix, sys.prefix),
    ):
        source = Path(__file__).with_name("program.py").read_text(encoding="utf-8")
        self._interpreter = {"python": python, "prefixes": prefixes, "source": source}
        reasons: dict[Walls, str] = {}
        candidates: tuple[Walls, ...] = (walls,) if walls else ("namespaces", "user")
        for candidate in candidates:
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
        """A sentence on what the walls keep out."""
        return PROTECTION[self.walls]

    def run(self, program: str, limits: Limits = Limits()) -> str:
        """`passed`, `timeout`, or what ended the program: an exception's name, a signal, or `left early`.

        No process that it has started is alive afterwards, and its files are gone.

        Raises:
            RuntimeError: the program was not started, since a wall could not be put up, or it does not end.
        """
        folder = tempfile.mkdtemp(prefix="sandbox-")
        settings = json.dumps({**limits.as_settings(), **self._interpreter})
        command = [sys.executable, "-I", "-S", str(_JAIL), self.walls, folder, settings]
        try:
            return _told_by(command, program.encode(errors="replace"), limits.seconds + _SPARE_SECONDS)
        finally:
            _remove(folder)


def _told_by(command: list[str], program: bytes, seconds: float) -> str:
    """The line that a jail prints; `timeout` where the jail had to be killed after so many seconds.

    Only the jail is waited for, and not what the program may have left behind.
    """
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
    except subprocess.TimeoutExpired:  # the jail keeps the time itself, unless the machine is at a standstill
        told, complaint = b"timeout", b""
    finally:
        with suppress(ProcessLookupError):
            os.killpg(jail.pid, signal.SIGKILL)
        for pipe in (jail.stdin, jail.stdout, jail.stderr):
            assert pipe is not None
            pipe.close()  # without reading on, since another process may hold its other end
        with suppress(subprocess.TimeoutExpired):
            jail.wait(_SPARE_SECONDS)
    if jail.returncode != 0 and told != b"timeout":
        raise RuntimeError(f"a program could not be run: {complaint.decode(errors='replace').strip()[-300:]}")
    return told.decode().strip()


def _remove(folder: str) -> None:
    """Remove a folder of any depth, which shutil's functions cannot, as far as the rights allow."""
    with suppress(OSError, subprocess.TimeoutExpired):
        if os.listdir(folder):
            subprocess.run(["rm", "-rf", "--", folder], timeout=_SPARE_SECONDS, check=False)
        else:
            os.rmdir(folder)


def _barrier(paths: tuple[str, ...]) -> Path | None:
    """The first folder on the way to one of these paths, or the path itself, that other users may not enter."""
    for path in paths:
        for way in (Path(path).absolute(), Path(path).resolve()):
            for place in (*reversed(way.parents), way):
                if place.exists() and not place.stat().st_mode & stat.S_IXOTH:
                    return place
    return None
