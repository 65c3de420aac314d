"""Which system calls a program may not make: a seccomp filter, in the Linux kernel's classic BPF.

A filter sees the number of a call and its arguments, and not the memory that these point to.
"""

import platform
import struct

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
REFUSED: dict[str, tuple[int, int | None]] = {  # name of a call -> its numbers on the machines; None: there is none
    # calls that reach other processes, or open a way to them
    "socket": (41, 198), "io_uring_setup": (425, 425), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
    # calls with which a debugger looks into other processes, and changes them
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "perf_event_open": (298, 241),
    # calls that tell what others do with files, or hold the kernel up at a page of memory
    "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "inotify_rm_watch": (255, 28), "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    "userfaultfd": (323, 282),
    # calls for memory that no limit of a process counts, and that may outlive it
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280),
    # calls for new namespaces, in which the program would have rights again
    "unshare": (272, 97), "setns": (308, 268),
}  # fmt: skip
CLONE, CLONE3, SOCKETPAIR = (56, 220), (435, 435), (53, 199)
ALLOW, KILL, REFUSE, UNKNOWN = 0x7FFF0000, 0x80000000, 0x50000 | 1, 0x50000 | 38  # EPERM, ENOSYS
_NAMESPACES = 0x7E020000  # every CLONE_NEW flag that clone takes
_UNIX, _STREAM, _TYPE = 1, 1, 0xF  # _TYPE masks the type of a socket; the other bits are flags
_X32 = 0x40000000  # from here on x86-64 has a second set of numbers for its calls
_NUMBER, _MACHINE, _FIRST, _SECOND = 0, 4, 16, 24  # offsets in the filter's input; of arguments the low halves
_LOAD, _AND, _RETURN, _EQUAL, _AT_LEAST, _ANY_BIT = 0x20, 0x54, 0x06, 0x15, 0x35, 0x45

Step = tuple[int, int, int, int]  # operation, steps to skip if true, steps to skip if false, operand


def instructions(machine: str | None = None) -> bytes:
    """The filter's bytes for a machine, by default this one.

    One kind of socket is allowed: a connected pair of streams, which asyncio needs and which reaches only its own ends.
    (A pair for datagrams could be pointed at any other socket.) clone3 hides its flags behind a pointer, so that it is
    answered as if the kernel did not know it, and libc uses clone instead.

    Raises:
        OSError: the numbers of this machine's calls are not known here.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise OSError(f"the sandbox knows the machines {', '.join(MACHINES)}, not {machine}")
    column = list(MACHINES).index(machine)
    steps = [
        (_LOAD, 0, 0, _MACHINE), (_EQUAL, 1, 0, MACHINES[machine]), (_RETURN, 0, 0, KILL),
        (_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, REFUSE),
    ]  # fmt: skip
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            steps += _at(number, [(_RETURN, 0, 0, REFUSE)])
    steps += _at(CLONE3[column], [(_RETURN, 0, 0, UNKNOWN)])
    steps += _at(
        CLONE[column],
        [(_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, _NAMESPACES), (_RETURN, 0, 0, REFUSE), (_RETURN, 0, 0, ALLOW)],
    )
    steps += _at(
        SOCKETPAIR[column],
        [
            (_LOAD, 0, 0, _FIRST), (_EQUAL, 0, 4, _UNIX),
            (_LOAD, 0, 0, _SECOND), (_AND, 0, 0, _TYPE), (_EQUAL, 0, 1, _STREAM), (_RETURN, 0, 0, ALLOW),
            (_RETURN, 0, 0, REFUSE),
        ],
    )  # fmt: skip
    steps.append((_RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def _at(number: int, then: list[Step]) -> list[Step]:
    """The filter's steps for the call of this number. `then` must return on every path."""
    return [(_EQUAL, 0, len(then), number), *then]
