"""Two hosts on this machine: network namespaces with names and addresses of their own, joined by one cable."""

import os
import re
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

NAMES = ("host-a", "host-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
INTERFACE = "eth0"


class Hosts:
    """Context in which they exist; when it ends, everything that runs on them is killed and they are gone."""

    def __init__(self):
        self._spaces = [f"sorsa-{os.getpid()}-{name}" for name in NAMES]

    def __enter__(self) -> "Hosts":
        _remove(space for space in _spaces() if not Path(f"/proc/{space.split('-')[1]}").exists())  # of killed tests
        try:
            for space in self._spaces:
                _ip("netns", "add", space)
            one, other = self._spaces
            _ip("-n", one, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", other)
            for space, address in zip(self._spaces, ADDRESSES, strict=True):
                _ip("-n", space, "addr", "add", f"{address}/24", "dev", INTERFACE)
                for device in ("lo", INTERFACE):
                    _ip("-n", space, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self, host: int, command: list[str], **options) -> subprocess.Popen:
        """Run a command on a host; `options` as of subprocess.Popen."""
        named = ["unshare", "--uts", "bash", "-c", 'hostname "$0" && exec "$@"', NAMES[host]]
        return subprocess.Popen(["ip", "netns", "exec", self._spaces[host], *named, *command], **options)

    def cut(self, host: int) -> None:
        """Pull the cable."""
        _ip("-n", self._spaces[host], "link", "set", INTERFACE, "down")

    def mend(self, host: int) -> None:
        """Plug it in again."""
        _ip("-n", self._spaces[host], "link", "set", INTERFACE, "up")

    def kill(self, host: int) -> None:
        """Pull the plug: SIGKILL to everything that runs there."""
        _kill(self._spaces[host])

    def __exit__(self, *_) -> None:
        _remove(self._spaces)


def _spaces() -> list[str]:
    """The namespaces of all tests, `sorsa-PID-HOST`, this one's and others'."""
    names = [line.split()[0] for line in _ip("netns", "list").splitlines()]
    return [name for name in names if re.fullmatch(r"sorsa-\d+-host-\w", name)]


def _kill(space: str) -> None:
    for pid in _ip("netns", "pids", space).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _remove(spaces: Iterable[str]) -> None:
    for space in spaces:
        with suppress(subprocess.CalledProcessError):
            _kill(space)
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "del", space)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
