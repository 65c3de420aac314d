"""SIGTERM and SIGUSR1: the warnings that a job is about to be ended. Every rank stops at the same micro-step.

Schedulers send them to all processes of a job, to one, or to a launcher that passes them on at its leisure; the ranks
therefore agree, before each micro-step and on the CPU alone, whether any of them has been warned.

Python runs signal handlers in the main thread, which may be waiting inside a collective for a rank that is dead. A
second thread, woken by the signal itself, then ends this process.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from sorsa_ds.runtime import collectives

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: saved; the same command with `--resume auto` goes on."""


class Preempted(Exception):
    """The run was told to stop, and has; the message says what was saved and how to go on."""


class StopRequest(Exception):
    """The run is told to stop; the message is the signal's name."""


def leave_when_told() -> None:
    """Until training begins there is nothing to save: leave at a signal, to be started again."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(EXIT_CODE))


class StopSignals:
    """Listens for the signals from its making on. A collective call.

    Args:
        timeout: how long a rank waits for the others' answers.
    """

    def __init__(self, timeout: timedelta = collectives.TIMEOUT):
        self._received = 0
        # Asking the GPU would make the CPU wait for it at every micro-step.
        self._group = collectives.cpu_group(timeout)
        host, pid = os.uname().nodename, os.getpid()
        self._peers = [p for h, p in collectives.gather_lists([(host, pid)]) if h == host and p != pid]
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # a handler must be there for the pipe to be written
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for watch, arguments in ((self._listen, (reading,)), (self._watch_launcher, (_launcher(),))):
            threading.Thread(target=watch, args=arguments, name="signals", daemon=True).start()

    def check(self) -> None:
        """Return if no rank has received a signal. A collective call.

        Raises:
            StopRequest: on every rank.
        """
        number = torch.tensor(self._received)
        if collectives.world_size() > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        if number:
            raise StopRequest(signal.Signals(int(number)).name)

    def _listen(self, reading: int) -> None:
        while True:
            number = os.read(reading, 1)[0]
            if number in SIGNALS:
                self._received = number
                threading.Thread(target=self._leave_with_the_dead, daemon=True).start()

    def _watch_launcher(self, launcher: list[psutil.Process]) -> None:
        """DeepSpeed's command, ended by a signal, leaves its ranks to themselves: they take that as SIGTERM."""
        while all(_alive(process.pid) for process in launcher):
            time.sleep(0.5)
        self._received = self._received or signal.SIGTERM

    def _leave_with_the_dead(self) -> None:
        """Launchers send SIGTERM too when a rank has died; nobody can be saved then."""
        while True:
            if not all(map(_alive, self._peers)):
                time.sleep(5)  # a peer that left in good order: this rank is about to
                print(f"\n[rank {collectives.rank()}] stopped because another rank is gone", flush=True)
                os._exit(1)
            time.sleep(0.5)


def _launcher() -> list[psutil.Process]:
    """The processes of DeepSpeed's launcher above this one."""
    found = []
    with suppress(psutil.Error):  # of a process that this user may not look at
        for process in psutil.Process().parents():
            # python .../bin/deepspeed ..., python -u -m deepspeed.launcher.launch ...; a shell around may end first.
            words = process.cmdline()[1:4]
            if not any(word.endswith("/deepspeed") or word == "deepspeed.launcher.launch" for word in words):
                break
            found.append(process)
    return found


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
