"""Python's stack has room: at no depth does a loop of calls map and unmap memory."""

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from sorsa_ds.runtime.call_stack import call_with_room

CALLS = 100


def faults_of_calls(depth: int) -> int:
    """The page faults of a loop of calls that stands so many frames deeper; the least of three tries."""
    if depth:
        return faults_of_calls(depth - 1)
    tries = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(CALLS):
            divide(7, 2)
        tries.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(tries)


def divide(number: int, by: int) -> tuple[int, int]:
    """Quotient and remainder."""
    return divmod(number, by)


def worst() -> int:
    """The page faults at the worst of 400 depths, which are more than a chunk holds."""
    return max(faults_of_calls(depth) for depth in range(400))


def in_a_thread(function: Callable[..., int], *args: object) -> int:
    """The result of a call in a thread, which begins with a stack of its own: that of the tests has room already."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function, *args).result()


def test_no_depth_is_slow():
    assert in_a_thread(call_with_room, worst) < CALLS / 2


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="3.13 and later keep a chunk in reserve, in versions since March 2026"
)
def test_without_room_some_depth_is():
    assert in_a_thread(worst) >= CALLS


def test_arguments_results_and_errors_are_handed_over():
    assert call_with_room(divide, 7, by=2) == (3, 1)
    assert call_with_room(dict, function=1) == {"function": 1}
    with pytest.raises(ZeroDivisionError) as caught:
        call_with_room(divide, 7, 0)
    assert caught.traceback[-1].name == "divide"
