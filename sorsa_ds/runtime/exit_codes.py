"""How a command ends when something is wrong: with one clear message and a non-zero exit code, and never with a hang.

The message of the rank that failed is printed before those of the ranks that suffer from it. A rank that is cut off
from the others ends too, because its collectives have a time-out (`train.timeout_minutes`).

The exit code is 2 for a mistake that the user can mend (ValueError), 75 for a run that was told to stop and can be
continued (`sorsa_ds.runtime.leave`), 130 for Ctrl-C in other commands, and 1 for everything else. It is also
written into a file where a launch script asks for that (`sorsa_ds.runtime.leave`).
"""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from sorsa_ds.runtime import launcher
from sorsa_ds.runtime.call_stack import call_with_room
from sorsa_ds.runtime.console import outlive_readers
from sorsa_ds.runtime.errors import PeerError, Preempted
from sorsa_ds.runtime.garbage import collect_garbage_rarely
from sorsa_ds.runtime.leave import EXIT_CODE, leave
from sorsa_ds.runtime.telemetry import turn_off_telemetry

_PEER_SECONDS = 5.0
_FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_PEER_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socketpollconnect",
    "no route to host",
    "ncclremoteerror",
    "remote process exited",
)
_MEMORY_SIGN = "out of memory"
"""What PyTorch, CUDA and NCCL say of this rank's own GPU."""

_SILENCE_SIGNS = (
    "timed out waiting",
    "wait timeout",
    "operation timed out",
    "connection timed out",
    "application timeout caused pair closure",  # gloo's, where another collective has waited in vain at the same time
)


def run(main: Callable[[], None]) -> None:
    """Call `main` and turn what it raises into a message and an exit code. This function does not return.

    A rank that only suffers from another rank's failure waits before it prints, so that the cause stands on top; the
    launcher usually ends the rank in the meantime. The process exits without running destructors, also after success.
    """
    rank = os.environ.get("RANK", "0")
    outlive_readers()
    turn_off_telemetry()
    collect_garbage_rarely()
    try:
        _hear_signals()
        call_with_room(main)
        if (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
            torch.distributed.barrier()
        sys.stdout.flush()
        leave("", 0)
    except SystemExit as leaving:
        code = leaving.code
        leave(code if isinstance(code, str) else "", code if isinstance(code, int) else int(code is not None))
    except KeyboardInterrupt:
        leave("interrupted" if rank == "0" else "", 130)
    except Preempted as stop:
        leave(str(stop) if rank == "0" else "", EXIT_CODE, in_order=True)
    except ValueError as error:
        if rank != "0":
            _wait_for_the_end(_PEER_SECONDS / 2)  # every rank finds most mistakes; rank 0 reports them
        leave(f"error: {error}", 2)
    except OSError as error:
        if error.errno in _FULL_OR_FORBIDDEN:
            leave(f"[rank {rank}] error: {error.filename or 'a file'} cannot be written: {error.strerror}", 2)
        leave(f"[rank {rank}] {type(error).__name__}: {error}\n{traceback.format_exc()}", 1)
    except Exception as error:
        if _is_consequence(error):
            _wait_for_the_end(_PEER_SECONDS)
            leave(f"[rank {rank}] {_cut_off(error)}", 1)
        if _MEMORY_SIGN in str(error).lower():
            leave(f"[rank {rank}] {_too_large(error)}", 1)
        leave(f"[rank {rank}] {type(error).__name__}: {error}\n{traceback.format_exc()}", 1)


def _hear_signals() -> None:
    """Undo that launch/common.sh has made this process deaf to two signals, and hear of the launcher's end.

    That script sends SIGUSR1 for Ctrl-C, since the launchers would answer a SIGINT. Training listens for more
    (`sorsa_ds.runtime.stop_signals`).
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.default_int_handler)
    launcher.watch()


def _wait_for_the_end(seconds: float) -> None:
    """Give the launcher time to end this process. From now on SIGTERM ends it at once, without saving anything."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


def _is_consequence(error: Exception) -> bool:
    """Whether an error on this rank only says that another rank has failed or is gone."""
    if isinstance(error, PeerError):
        return True
    told = str(error).lower()
    lost = isinstance(error, RuntimeError)  # PyTorch's errors of communication are such
    return lost and any(sign in told for sign in _PEER_SIGNS + _SILENCE_SIGNS)


def _too_large(error: Exception) -> str:
    """A message for a GPU that is full, with the library's own words."""
    return (
        f"error: node {os.uname().nodename}: a GPU of this rank is out of memory ({error}). A smaller "
        f"train.micro_batch_size, train.gradient_checkpointing=true or a 4-bit residual need less; launch/plan.py with "
        f"the same settings tells how much, and nvidia-smi whether another process holds memory"
    )


def _cut_off(error: Exception) -> str:
    """A message that explains the loss of another rank, followed by the library's own words for it."""
    if isinstance(error, PeerError):
        return str(error)
    silent = any(sign in str(error).lower() for sign in _SILENCE_SIGNS)
    lost = "has not answered within train.timeout_minutes" if silent else "cannot be reached"
    return (
        f"node {os.uname().nodename}: stopped because another rank {lost}: it was killed, or its node is cut off. The "
        f"saved checkpoints are whole; the same command with --resume auto continues from the last one ({error})"
    )
