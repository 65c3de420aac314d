"""Walls for programs, where this machine permits them, and a look at whether a program has survived them."""

import os
import time
from pathlib import Path

import psutil
import pytest

from sorsa_ds.evaluate.sandbox.runner import Sandbox


def sandbox_or_skip(walls: str) -> Sandbox:
    """A system interpreter where this one lies in a home folder that nobody else may enter."""
    try:
        return Sandbox(walls)
    except ValueError as error:
        if walls == "user" and Path("/usr/bin/python3").exists():
            try:
                return Sandbox(walls, "/usr/bin/python3", ())
            except ValueError:
                pass
        pytest.skip(str(error))


def see_that_nothing_is_left(before: set[int]) -> None:
    """Wait until no process of a program or of its walls is left, and fail if one stays.

    Only descendants of this process and orphans count, not the children of pytest-xdist's other processes.

    Args:
        before: the processes that were there before.
    """
    until = time.monotonic() + 10
    while time.monotonic() < until:
        left = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and _is_program(p) and _is_ours(p)]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"still alive: {left}")


def _is_ours(process: psutil.Process) -> bool:
    try:
        parents = process.parents()
    except psutil.NoSuchProcess:
        return False
    return len(parents) < 2 or os.getpid() in {parent.pid for parent in parents}


def _is_program(process: psutil.Process) -> bool:
    return any("RESULT = 3" in argument or "jail.py" in argument for argument in process.info["cmdline"] or [])
