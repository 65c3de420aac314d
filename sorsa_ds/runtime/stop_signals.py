"""SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask a job to end. All ranks then stop at the same micro-step.

Schedulers send these signals to all processes of a job, to one of them, or to a launcher that passes them on some time
later. The ranks therefore ask one another before each micro-step, between their CPUs, whether any of them has been told
to stop. Nobody waits for the answer: it is read before the next micro-step, by all ranks alike.

Python runs signal handlers in the main thread, which may be waiting inside a collective for a rank that is dead. In
that case a second thread, which the signal itself wakes, ends this process.

Of several signals the one with the lowest number is told: DeepSpeed's launcher answers Ctrl-C, which the ranks get as
SIGINT too, with SIGTERM, and on a busy machine either may come first.
"""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.leave import SIGNALS, leave, sent

T = TypeVar("T")
NONE = signal.NSIG
"""Stands for no signal where the lowest number is looked for."""


class StopRequest(Exception):
    """The run is being told to stop. The message is the name of the signal that was sent to the job."""


class StopSignals:
    """Listens for the signals, from its construction on. Constructing it is a collective call.

    Args:
        group: a group of all ranks, over which their CPUs ask one another: a GPU would have to be waited for.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._received = self._interruptions = 0
        self._group = group
        host, pid = os.uname().nodename, os.getpid()
        self._asked: tuple[torch.Tensor, dist.Work] | None = None
        self._peers = [p for h, p in collectives.gather_lists([(host, pid)]) if h == host and p != pid]
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # Python writes to the pipe only where a handler is set
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()

    def check(self) -> None:
        """Do nothing if no rank had received a signal when this was called last. A collective call.

        Raises:
            StopRequest: on every rank, if any rank had received one.
        """
        number = self._received
        if collectives.world_size() > 1:
            number = self._answer()
            mine = torch.tensor(self._received or NONE)
            work = dist.all_reduce(mine, op=dist.ReduceOp.MIN, group=self._group, async_op=True)
            self._asked = mine, work
        if number:
            raise StopRequest(sent(number))

    def _answer(self) -> int:
        """The lowest number of a signal that any rank had received at the last question; 0 for none."""
        if self._asked is None:
            return 0
        answer, work = self._asked
        work.wait()
        number = int(answer.numpy())  # numpy reads a CPU's numbers only, so no GPU can be waited for here
        return 0 if number == NONE else number

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """The items, with a `check` before each of them is handed out. Every step is a collective call.

        Raises:
            StopRequest: any rank has received a signal.
        """
        for item in items:
            self.check()
            yield item

    def _listen(self, reading: int) -> None:
        """Note every signal that arrives. Runs in a thread of its own."""
        while True:
            number = os.read(reading, 1)[0]
            if number not in SIGNALS:
                continue
            self._interruptions += number == signal.SIGINT
            if self._interruptions > 1:
                leave("interrupted twice: ended without saving" if collectives.rank() == 0 else "", 128 + number)
            first, self._received = not self._received, min(self._received or NONE, number)
            if first:
                threading.Thread(target=self._leave_with_the_dead, daemon=True).start()

    def _leave_with_the_dead(self) -> None:
        """End this process if a peer is dead: launchers send SIGTERM then too, and no rank can save any more."""
        while True:
            if not all(map(_alive, self._peers)):
                time.sleep(5)  # the peer may have left in good order, and then this rank is about to
                leave(f"[rank {collectives.rank()}] stopped because another rank is gone", 1)
            time.sleep(0.5)


def _alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
