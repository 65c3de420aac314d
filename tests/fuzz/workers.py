"""Calling a function in processes of its own, with a time limit for each call: a hang costs one process."""

import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

FORK = multiprocessing.get_context("fork")
HANG = "hang"
MORE_MEMORY = 4 * 2**30
"""Bytes of address space that a worker may take beyond what it has when it starts."""


@dataclass
class _Worker:
    """A process that answers one call at a time. call: the number of the one that it works on; None: it is idle."""

    process: Any
    connection: Connection
    call: int | None = None
    deadline: float = 0.0


def answers(
    function: Callable[[Any], Any], calls: Iterable[Any], seconds: float, count: int
) -> Iterator[tuple[Any, Any]]:
    """(call, answer) of every call, as they come in.

    The answer is a text instead where the function raised an exception or its process ended, and HANG where it took
    longer than `seconds`.

    Args:
        function: it gives no text.
        count: the number of processes.
    """
    waiting = list(enumerate(calls))
    asked = dict(waiting)
    waiting.reverse()
    workers = [_started(function) for _ in range(count)]
    try:
        while waiting or any(worker.call is not None for worker in workers):
            for worker in workers:
                if worker.call is None and waiting:
                    worker.call, call = waiting.pop()
                    worker.deadline = time.monotonic() + seconds
                    worker.connection.send(call)
            busy = [worker for worker in workers if worker.call is not None]
            ready = wait([worker.connection for worker in busy], timeout=0.2)
            for worker in busy:
                number = worker.call
                if worker.connection in ready:
                    try:
                        answer = worker.connection.recv()
                        worker.call = None
                    except EOFError:
                        answer = f"the process ended with code {_ended(worker)}"
                elif time.monotonic() > worker.deadline:
                    answer = HANG
                else:
                    continue
                if worker.call is not None:
                    _ended(worker)
                    workers[workers.index(worker)] = _started(function)
                yield asked[number], answer
    finally:
        for worker in workers:
            _ended(worker)


def _started(function: Callable[[Any], Any]) -> _Worker:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_serve, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _ended(worker: _Worker) -> int | None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()
    return worker.process.exitcode


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    with open("/proc/self/statm") as numbers:
        taken = int(numbers.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MORE_MEMORY, resource.RLIM_INFINITY))
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        try:
            connection.send(function(call))
        except BaseException:
            connection.send(traceback.format_exc())
