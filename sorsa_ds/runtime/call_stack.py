"""Room for Python's own stack, so that a loop of calls does not map and unmap memory again and again."""

from collections.abc import Callable
from typing import TypeVar

_SLOTS = 2**16
"""Pointers for which the outermost frame asks. CPython rounds 512 KiB and a little up to a chunk of 1 MiB, whose other
half takes about a thousand frames, as many as its limit of recursion allows."""

Result = TypeVar("Result")


def call_with_room(function: Callable[..., Result], /, *args: object, **named: object) -> Result:
    """Call a function with room in one chunk of Python's stack for the thousand frames or so that may lie below it.

    CPython keeps the variables of running functions in chunks of 16 KiB. Where a loop stands near the end of one, each
    call of its body maps a new chunk and each return unmaps it: at the depth of a training step that is done thousands
    of times, and a page fault each (python/cpython issue 142183; versions since March 2026 keep one chunk in reserve).
    Memory that no frame uses is never touched.
    """

    def outermost() -> Result:
        return function(*args, **named)

    outermost.__code__ = outermost.__code__.replace(co_stacksize=_SLOTS)
    return outermost()
