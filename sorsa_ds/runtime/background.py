"""Work in a thread while the caller goes on, or while the other ranks wait for it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import torch

from sorsa_ds.runtime import collectives

T = TypeVar("T")
_SHORTEST, _LONGEST = 0.01, 1.0
"""Seconds between two questions whether rank 0 is done: at first, and after a while."""


def on_this_device(action: Callable[[], T]) -> Callable[[], T]:
    """The action, for another thread: with the caller's GPU as the current one, if the caller uses any.

    A new thread begins with GPU 0, and on that of another rank the first call of CUDA takes half a GiB of memory.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def act() -> T:
        if device is not None:
            torch.cuda.set_device(device)
        return action()

    return act


def in_background(action: Callable[[], T], name: str) -> "Future[T]":
    """What an action will give, which runs in a thread on the caller's device and ends with the process.

    Args:
        name: the thread's name.
    """
    future: Future[T] = Future()
    act = on_this_device(action)

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def patiently(action: Callable[[], T], device: torch.device) -> T | None:
    """Like `collectives.together` on rank 0, for work that may take longer than a collective may. A collective call.

    A thread of rank 0 does the work, and at least once a second the ranks ask whether it is done: none of them waits
    long for another, so that `train.timeout_minutes` ends nothing, and all of them are there until it is done.

    Args:
        action: must call no collective.

    Returns:
        The action's result; None on the other ranks.

    Raises:
        Exception: the action's own error, on rank 0.
        PeerError: on the other ranks, with rank 0's message.
    """
    if collectives.world_size() == 1:
        return action()
    running = in_background(action, "patient") if collectives.rank() == 0 else None
    pause, done = _SHORTEST, False
    while not done:
        if running is not None:
            wait([running], pause)
        done = collectives.total(float(running is not None and running.done()), device).item() > 0
        pause = min(2 * pause, _LONGEST)
    return collectives.together(lambda: None if running is None else running.result(), device)
