"""How a command ends when something is wrong: one message, the failing rank's first, a non-zero exit code, no hang.

A rank that is cut off from the others ends too: its collectives have a time-out (`train.timeout_minutes`).

Exit codes: 2 for what the user can mend (ValueError), 75 for a run that was told to stop and can be continued
(`sorsa_ds.runtime.stop_signals`), 1 for everything else. Launchers may lose the code (torchrun makes 1 of each): the
first rank to fail therefore writes it into the file that SORSA_EXIT_FILE names, unless that exists.
"""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

import torch

from sorsa_ds.runtime.collectives import PeerError
from sorsa_ds.runtime.stop_signals import EXIT_CODE, Preempted

EXIT_FILE = "SORSA_EXIT_FILE"
_PEER_SECONDS = 5.0
_FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_PEER_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socketpollconnect",
    "no route to host",
    "nccl",
)
_SILENCE_SIGNS = ("timed out waiting", "wait timeout", "operation timed out", "connection timed out")


def run(main: Callable[[], None]) -> None:
    """Call `main` and turn what it raises into a message and an exit code. Does not return.

    A rank that only suffers from another one's failure waits first, so that the cause is printed on top; the launcher
    usually ends it meanwhile. The process leaves without unwinding, after success too: the destructors of process
    groups can hang, or abort a run that is done.
    """
    rank = os.environ.get("RANK", "0")
    try:
        main()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        _leave("", 0)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except Preempted as stop:
        _leave(str(stop) if rank == "0" else "", EXIT_CODE)
    except ValueError as error:
        if rank != "0":
            _wait_for_the_end(_PEER_SECONDS / 2)  # most mistakes are found by every rank alike; rank 0 tells
        _leave(f"error: {error}", 2)
    except OSError as error:
        if error.errno in _FULL_OR_FORBIDDEN:
            _leave(f"[rank {rank}] error: {error.filename or 'a file'} cannot be written: {error.strerror}", 2)
        _leave(f"[rank {rank}] {type(error).__name__}: {error}\n{traceback.format_exc()}", 1)
    except Exception as error:
        if _is_consequence(error):
            _wait_for_the_end(_PEER_SECONDS)
            _leave(f"[rank {rank}] {_cut_off(error)}", 1)
        _leave(f"[rank {rank}] {type(error).__name__}: {error}\n{traceback.format_exc()}", 1)


def _wait_for_the_end(seconds: float) -> None:
    """Give the launcher time to end this process, which no longer saves anything when it is told to."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


def _is_consequence(error: Exception) -> bool:
    if isinstance(error, PeerError):
        return True
    told = str(error).lower()
    lost = isinstance(error, torch.distributed.DistError | RuntimeError)
    return lost and any(sign in told for sign in _PEER_SIGNS + _SILENCE_SIGNS)


def _cut_off(error: Exception) -> str:
    """What the loss of another rank means, before the words of the library that has noticed it."""
    if isinstance(error, PeerError):
        return str(error)
    silent = any(sign in str(error).lower() for sign in _SILENCE_SIGNS)
    lost = "has not answered within train.timeout_minutes" if silent else "cannot be reached"
    return (
        f"node {os.uname().nodename}: stopped because another rank {lost}: it was killed, or its node is cut off. What "
        f"was saved is whole; the same command with --resume auto goes on from there ({error})"
    )


def _leave(message: str, code: int) -> None:
    sys.stdout.flush()
    if message:
        print(f"\n{message}", file=sys.stderr, flush=True)
    if code and (file := os.environ.get(EXIT_FILE)):
        with suppress(OSError), open(file, "x") as first:
            first.write(f"{code}\n")
    os._exit(code)
