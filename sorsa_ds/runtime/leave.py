"""How a process ends: with a message, and with an exit code that also stands in a file.

Launchers may lose the code: torchrun turns each of them into 1, and `deepspeed` into 0 where its own inner process was
killed. Every rank therefore writes its code into the file that the environment variable SORSA_EXIT_FILE names, unless
that file exists: the first rank to fail counts. A run whose file is missing did not come to its end.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from sorsa_ds.runtime.console import in_red, printable
from sorsa_ds.runtime.launcher import begin_again

EXIT_FILE = "SORSA_EXIT_FILE"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""The signals that ask a job to end."""

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run is saved, and the same command with `--resume auto` continues it."""


def leave(message: str, code: int, in_order: bool = False) -> NoReturn:
    """Print a message, write the exit code where SORSA_EXIT_FILE asks for it, and end this process at once.

    No destructor runs: a process group's can hang, or abort a run that has finished.

    Args:
        in_order: all ranks leave with this code by themselves. The launcher gets 0 instead where the file has the code:
            torchrun would print a traceback for any other, and DeepSpeed's launcher an error.
    """
    file = os.environ.get(EXIT_FILE)
    if file:
        with suppress(OSError), open(file, "x") as first:
            first.write(f"{code}\n")
    with suppress(OSError):  # a full disk is an error of its own, which `exit_codes.run` reports
        sys.stdout.flush()
    if message:
        print(f"\n{in_red(printable(message)) if code in (1, 2) else printable(message)}", file=sys.stderr, flush=True)
    os._exit(0 if in_order and file and os.path.exists(file) else code)


@contextmanager
def leaving_after(seconds: float, message: str) -> Iterator[None]:
    """Context that ends the process with exit code 0 where its body takes longer than so many seconds.

    It is for work that others may leave waiting for ever, after everything that counts is done and written.

    Args:
        message: printed then, on rank 0.
    """
    told = message if os.environ.get("RANK", "0") == "0" else ""
    timer = threading.Timer(seconds, lambda: leave(told, 0))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def receiving(handle: Callable[[str], None]) -> Iterator[None]:
    """Context in which the signals that ask a job to end are handed on; outside of it they have their earlier effect.

    Args:
        handle: called with the name of a signal when this process receives it.
    """

    def receive(number: int, _frame: object) -> None:
        handle(signal.Signals(number).name)

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sent(number: int) -> str:
    """The name of the signal that was sent to the job, where this process has received the one with this number.

    The scripts of launch/ pass SIGTERM and Ctrl-C on as SIGUSR1, and write the name of what they got beside the file of
    exit codes.
    """
    told, file = "", os.environ.get(EXIT_FILE)
    if number == signal.SIGUSR1 and file:
        with suppress(OSError, UnicodeDecodeError), open(f"{file}.signal", encoding="ascii") as names:
            told = names.read(20).strip()
    return told if told in {one.name for one in SIGNALS} else signal.Signals(number).name


def leave_when_told() -> None:
    """End the process at a signal, with the exit code that asks to be started again: nothing is there to save yet."""
    for number in SIGNALS:
        signal.signal(number, lambda number, _: leave(_nothing_saved(number), EXIT_CODE))


def _nothing_saved(number: int) -> str:
    if os.environ.get("RANK", "0") != "0":
        return ""
    return (
        f"{sent(number)}: stopped before the first step, when there was nothing to save; begin again with: "
        f"{begin_again()}"
    )
