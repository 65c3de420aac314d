"""Work in a thread while the caller goes on."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")


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
        name: of the thread.
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
