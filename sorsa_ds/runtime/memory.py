"""The memory that this machine has to give, without importing DeepSpeed."""

from contextlib import suppress
from pathlib import Path

import psutil


def free_memory() -> int:
    """Bytes that this process can still take: what the host has, or what its control group leaves."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, StopIteration):  # no control groups of version 2, or no limit
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        folder = Path("/sys/fs/cgroup") / next(line[3:] for line in groups if line.startswith("0::")).lstrip("/")
        limit, used = (int((folder / f"memory.{what}").read_text()) for what in ("max", "current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]))  # files that are read again when they are needed
    return free
