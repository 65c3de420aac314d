"""Which Linux calls a program may not make: a seccomp filter, in the kernel's classic BPF.

A filter sees a call's number and its arguments, not what they point to.
"""

import platform
import struct

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
REFUSED = {  # their numbers on each of the machines
    # what talks to other processes, or opens what does
    "socket": (41, 198), "io_uring_setup": (425, 425), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
    # memory that no limit of a process counts, and that may outlive it
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280),
    # namespaces, in which it would have rights again
    "unshare": (272, 97), "setns": (308, 268),
}  # fmt: skip
CLONE, CLONE3, SOCKETPAIR = (56, 220), (435, 435), (53, 199)
ALLOW, KILL, REFUSE, UNKNOWN = 0x7FFF0000, 0x80000000, 0x50000 | 1, 0x50000 | 38  # EPERM, ENOSYS
_NAMESPACES = 0x7E020000  # every CLONE_NEW flag that clone takes
_UNIX, _STREAM, _TYPE = 1, 1, 0xF  # the other bits of a socket's type are flags
_X32 = 0x40000000  # from here on: a second set of numbers for x86-64's calls
_NUMBER, _MACHINE, _FIRST, _SECOND = 0, 4, 16, 24  # places in what the filter is given; arguments: the low halves
_LOAD, _AND, _RETURN, _EQUAL, _AT_LEAST, _ANY_BIT = 0x20, 0x54, 0x06, 0x15, 0x35, 0x45

Step = tuple[int, int, int, int]  # what, how many steps to skip if true, if false, a number


def instructions(machine: str | None = None) -> bytes:
    """The filter for a machine, by default this one.

    One kind of socket is left: a connected pair of streams, which asyncio needs and which reaches only its own ends.
    (A pair for datagrams can be pointed at any other socket.) clone3 hides its flags behind a pointer: it is unknown
    here, and libc takes clone.

    Raises:
        OSError: calls have other numbers there.
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
        steps += _at(numbers[column], [(_RETURN, 0, 0, REFUSE)])
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
    """Steps for one call; all of their ways return."""
    return [(_EQUAL, 0, len(then), number), *then]
