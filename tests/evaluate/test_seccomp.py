"""The calls that a program may not make: tried from inside, and the filter interpreted for every machine."""

import platform
import struct

import pytest

from sorsa_ds.evaluate.sandbox import seccomp

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.mark.slow
def test_no_call_that_is_refused_can_be_made(sandbox):
    """The ending of the program is the name of the first that could."""
    column = list(seccomp.MACHINES).index(platform.machine())
    refused, unknown = 1, 38  # EPERM, ENOSYS
    arguments = {  # that would succeed, where a call needs no more than numbers
        "socket": (1, 1, 0), "io_uring_setup": (1, bytes(120)), "unshare": (0x10000000,), "setns": (-1, 0),
        "shmget": (0, 4096, 0o600), "shmat": (-1, 0, 0), "shmctl": (0, 14, bytes(200)),
        "memfd_create": (b"a", 0), "memfd_secret": (0,), "bpf": (0, 0, 0),
        "msgget": (0, 0o600), "msgsnd": (-1, 0, 0, 0), "msgrcv": (-1, 0, 0, 0, 0), "msgctl": (0, 12, bytes(200)),
        "semget": (0, 1, 0o600), "semop": (-1, 0, 0), "semctl": (-1, 0, 0, 0), "semtimedop": (-1, 0, 0, 0),
        "mq_open": (b"a", 0o102, 0o600, 0), "mq_unlink": (b"a",),
        "add_key": (b"user", b"a", b"b", 1, -3), "request_key": (b"user", b"a", 0, -3), "keyctl": (0, -3, 1),
        "ptrace": (0, 0, 0, 0), "process_vm_readv": (0,) * 6, "process_vm_writev": (0,) * 6, "kcmp": (-1, -1, 0, 0, 0),
        "pidfd_getfd": (-1, 0, 0), "perf_event_open": (bytes(128), 0, -1, -1, 0), "userfaultfd": (1,),
        "inotify_init": (), "inotify_init1": (0,), "inotify_add_watch": (-1, b"/", 1), "inotify_rm_watch": (-1, 0),
        "fanotify_init": (0x200, 0), "fanotify_mark": (-1, 1, 0, -1, 0),
    }  # fmt: skip
    assert arguments.keys() == seccomp.REFUSED.keys()
    calls = [(name, seccomp.REFUSED[name][column], of_it, refused) for name, of_it in arguments.items()]
    calls = [call for call in calls if call[1] is not None]
    calls += [
        ("clone", seccomp.CLONE[column], (0x10000000 | 17, 0, 0, 0, 0), refused),
        ("clone3", seccomp.CLONE3[column], (0, 0), unknown),
        ("socketpair", seccomp.SOCKETPAIR[column], (1, 2, 0, bytes(8)), refused),
        ("second_numbers", 0x40000000 | seccomp.REFUSED["socket"][column], (1, 1, 0), refused),
    ]
    source = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name, number, arguments, answer in {calls}:
    if libc.syscall(number, *arguments) != -1 or ctypes.get_errno() != answer:
        raise type(name, (Exception,), {{}})
"""
    assert sandbox.run(source) == "passed"


@pytest.mark.slow
def test_threads_children_and_event_loops_work(sandbox):
    source = """
import asyncio, os, socket, subprocess, threading
asyncio.run(asyncio.sleep(0))
thread = threading.Thread(target=print)
thread.start()
thread.join()
subprocess.run(["true"], check=True)
subprocess.run(["true"], check=True, preexec_fn=os.getpid)
for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
    try:
        socket.socketpair(socket.AF_UNIX, kind)
    except PermissionError:
        pass
    else:
        raise KeyError
"""
    assert sandbox.run(source) == "passed"


def _answer(filter_: bytes, machine: int, number: int, *arguments: int) -> int:
    """What the kernel would answer to a call, by the meaning of classic BPF (linux/bpf_common.h)."""
    seen = struct.pack("<iIQ6Q", number, machine, 0, *arguments, *[0] * (6 - len(arguments)))
    steps, at, value = list(struct.iter_unpack("<HBBI", filter_)), 0, 0
    tests = {0x15: lambda k: value == k, 0x35: lambda k: value >= k, 0x45: lambda k: value & k != 0}
    while True:
        code, if_true, if_false, constant = steps[at]
        if code == 0x06:
            return constant
        if code == 0x20:
            value = struct.unpack_from("<I", seen, constant)[0]
        elif code == 0x54:
            value &= constant
        else:
            at += if_true if tests[code](constant) else if_false
        at += 1


@pytest.mark.parametrize(("machine", "foreign"), [("x86_64", "aarch64"), ("aarch64", "x86_64")])
def test_the_filter_of_every_machine_refuses_and_allows(machine, foreign):
    filter_, column = seccomp.instructions(machine), list(seccomp.MACHINES).index(machine)

    def answer(*call):
        return _answer(filter_, seccomp.MACHINES[machine], *call)

    refused = {numbers[column] for numbers in seccomp.REFUSED.values()} - {None}
    for number in refused:
        assert answer(number) == seccomp.REFUSE
        assert answer(number | 0x40000000) == seccomp.REFUSE
        assert _answer(filter_, seccomp.MACHINES[foreign], number) == seccomp.KILL
    assert answer(seccomp.CLONE3[column]) == seccomp.UNKNOWN
    clone, pair = seccomp.CLONE[column], seccomp.SOCKETPAIR[column]
    assert answer(clone, 0x01200011) == answer(clone, 0x3D0F00) == seccomp.ALLOW  # as fork and as a thread
    for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert answer(clone, namespace | 17) == seccomp.REFUSE
    assert answer(pair, 1, 0o2000001) == seccomp.ALLOW  # with close-on-exec
    for family, kind in ((1, 2), (1, 5), (2, 1), (1, 0o2000002)):
        assert answer(pair, family, kind) == seccomp.REFUSE
    others = set(range(500)) - refused - {clone, pair, seccomp.CLONE3[column]}
    assert all(answer(number) == seccomp.ALLOW for number in others)
    with pytest.raises(OSError, match="x86_64, aarch64, not riscv64"):
        seccomp.instructions("riscv64")
