"""The system calls that wall a process in, made with the standard library alone.

Each function raises OSError where the kernel or a container does not permit its call.
"""

import ctypes
import os
import struct
from contextlib import suppress
from pathlib import Path

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
_MOUNT_SETATTR = 442  # the call's number, the same on every machine
_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Give this process namespaces of its own."""
    _check_call(_libc.unshare(flags), "unshare")


def map_user(uid: int, gid: int) -> None:
    """Keep this process's user and group ids in the user namespace that it has just entered."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def drop_to(uid: int, gid: int) -> None:
    """Become an ordinary user for good."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def become_killer(of: int, uid: int) -> None:
    """Become able to signal the processes of user `of`, which cannot signal this one, since it is `uid`'s."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, of, uid)


def new_root(root: Path, visible: list[Path], work: str, work_bytes: int) -> None:
    """Make the empty folder `root` this process's whole file system, inside of its new mount namespace.

    It holds `visible` read-only, /dev/null, /dev/zero, /dev/urandom, /proc of the new PID namespace, and `work`, an
    empty folder of at most `work_bytes` that any user may write into. Nothing else of the machine is there, except for
    the names of the folders that lead to these.
    """
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path in visible:
        inside = root / path.relative_to("/")
        if os.path.lexists(inside):
            continue
        if path.is_symlink():
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.symlink_to(os.readlink(path))
        else:
            _show(path, inside)
    for device in ("null", "zero", "urandom"):
        inside = root / "dev" / device
        inside.parent.mkdir(exist_ok=True)
        inside.touch()
        _mount(f"/dev/{device}", inside, None, _BIND)
    (root / "proc").mkdir()
    with suppress(OSError):  # where a container hides parts of /proc none may be mounted, and the folder stays empty
        _mount("proc", root / "proc", "proc", _NOSUID | _NODEV)
    place = root / work.lstrip("/")
    place.mkdir(parents=True)
    old = root / "old"
    old.mkdir()
    _check_call(_libc.pivot_root(os.fsencode(root), os.fsencode(old)), "pivot_root")
    os.chdir("/")
    _check_call(_libc.umount2(b"/old", _DETACH), "umount")
    os.rmdir("/old")
    _restrict("/", recursive=False)
    _mount("tmpfs", work, "tmpfs", _NOSUID | _NODEV, f"size={work_bytes},nr_inodes=4096,mode=777")


def filter_calls(instructions: bytes) -> None:
    """Filter the system calls of this process and its children from now on (sorsa_ds.evaluate.sandbox.seccomp)."""
    code = ctypes.create_string_buffer(instructions)
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(instructions) // 8, ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(filter_))


def no_new_rights() -> None:
    """From now on no set-user-id program gives this process or its children rights that they do not have."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def close_proc_entry() -> None:
    """Close this process's files under /proc to others of its user, until it becomes another program (execve)."""
    _prctl(_PR_SET_DUMPABLE, 0)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Have this process become the parent of those of its descendants whose parents end."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _show(path: Path, inside: Path) -> None:
    """Mount a file or folder of the machine, read-only, at a place in the new root."""
    if path.is_dir():
        inside.mkdir(parents=True)
    else:
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.touch()
    _mount(path, inside, None, _BIND | _REC)
    _restrict(inside, recursive=True)


def _restrict(place: Path | str, recursive: bool) -> None:
    """Make a mount read-only, without devices and set-user-id programs; `recursive`: all under it too (Linux 5.12)."""
    attributes = ctypes.create_string_buffer(struct.pack("QQQQ", _RDONLY | _NOSUID | _NODEV, 0, 0, 0))
    depth = 0x8000 if recursive else 0
    result = _libc.syscall(_MOUNT_SETATTR, -100, os.fsencode(place), depth, attributes, 32)
    _check_call(result, f"mount_setattr {place}")


def _mount(source, target, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    data = None if options is None else options.encode()
    _check_call(_libc.mount(*encoded, ctypes.c_ulong(flags), data), f"mount {target}")


def _prctl(option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)][:4]
    _check_call(_libc.prctl(option, *padded), f"prctl {option}")


def _check_call(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
