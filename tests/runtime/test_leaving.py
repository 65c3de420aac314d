"""How processes end: by which signal, with which exit code, in the file too, and with which message."""

import os
import signal
import sys
import time
from collections.abc import Callable

import pytest
import torch

from sorsa_ds.runtime import exit_codes, launcher
from sorsa_ds.runtime.errors import PeerError, Preempted
from sorsa_ds.runtime.leave import leave_when_told
from sorsa_ds.runtime.stop_signals import StopRequest, StopSignals
from tests.helpers.worlds import FORK


@pytest.fixture
def ends(tmp_path, monkeypatch, capfd):
    """Runs something in a process of its own; returns (exit code, content of the exit file, what it printed).

    Signals are sent one after the other, as soon as the process has made a file with the number of the next one.
    """
    monkeypatch.setenv("SORSA_EXIT_FILE", str(tmp_path / "code"))
    monkeypatch.setattr(exit_codes, "_PEER_SECONDS", 0.1)
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--local_rank=0", "output.name=a run"])
    launcher._begin.cache_clear()

    def run(action: Callable[..., None], *signals: int, file="code") -> tuple[int, str, str]:
        monkeypatch.setenv("SORSA_EXIT_FILE", str(tmp_path / file))
        process = FORK.Process(target=action, args=(lambda number: (tmp_path / f"{number}").touch(),), daemon=True)
        process.start()
        for place, number in enumerate(signals):
            until = time.monotonic() + 30
            while not (tmp_path / f"{place}").exists():
                assert process.is_alive() and time.monotonic() < until
                time.sleep(0.01)
            os.kill(process.pid, number)
        process.join(30)
        code = (tmp_path / file).read_text() if (tmp_path / file).exists() else ""
        return process.exitcode, code, capfd.readouterr().err

    yield run
    launcher._begin.cache_clear()


def _ending(error: BaseException | None) -> Callable:
    def main() -> None:
        if error is not None:
            raise error

    return lambda ready: exit_codes.run(main)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (None, 0, ""),
        (ValueError("no such file"), 2, "error: no such file"),
        (SystemExit(3), 3, ""),
        (SystemExit(), 0, ""),
        (SystemExit("usage"), 1, "usage"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PeerError("rank 1 has failed"), 1, "[rank 0] rank 1 has failed"),
        (RuntimeError("a bug"), 1, "[rank 0] RuntimeError: a bug"),
    ],
)
def test_every_end_is_in_the_file(ends, error, code, told):
    ended, written, printed = ends(_ending(error))
    assert (ended, written) == (code, f"{code}\n")
    assert printed.strip().startswith(told)


def test_a_run_that_stops_in_order_hides_it_from_the_launcher_where_the_file_tells(ends):
    assert ends(_ending(Preempted("stopped"))) == (0, "75\n", "\nstopped\n")
    assert ends(_ending(Preempted("stopped")), file="no/folder") == (75, "", "\nstopped\n")


def test_the_first_rank_to_fail_counts(ends):
    ends(_ending(ValueError("first")))
    assert ends(_ending(None))[:2] == (0, "2\n")


@pytest.mark.parametrize(
    ("told", "consequence"),
    [
        ("NCCL error in: x.cpp:1, ncclRemoteError: a call failed", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("Connection closed by peer [10.0.0.2]:4711", True),
        ("NCCL error in: x.cpp:1, ncclUnhandledCudaError: Call to CUDA function failed.", False),
        ("NCCL error: ncclInvalidUsage: Duplicate GPU detected", False),
    ],
)
def test_an_error_of_nccl_is_taken_for_the_loss_of_a_rank_only_where_it_says_so(ends, told, consequence):
    _, _, printed = ends(_ending(torch.distributed.DistBackendError(told)))
    assert told in printed
    assert ("another rank cannot be reached" in printed) == consequence


def _command_until_told(ready) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as the launch scripts leave them
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    exit_codes.run(lambda: (ready(0), time.sleep(30)))


def test_another_command_is_interrupted_by_the_signal_of_the_scripts(ends):
    assert ends(_command_until_told, signal.SIGUSR1) == (130, "130\n", "\ninterrupted\n")


def test_another_command_is_ended_by_sigterm(ends):
    assert ends(_command_until_told, signal.SIGTERM)[:2] == (-signal.SIGTERM, "")


def _before_training(ready) -> None:
    leave_when_told()
    ready(0)
    time.sleep(30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_the_first_step_is_told_with_the_command_that_begins_again(ends, number):
    code, written, printed = ends(_before_training, number)
    assert (code, written) == (75, "75\n")
    assert printed.strip() == (
        f"{number.name}: stopped before the first step, when there was nothing to save; begin again with: "
        "python launch/train.py 'output.name=a run' --resume auto"
    )


@pytest.mark.parametrize(
    ("written", "told"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("rubbish", "SIGUSR1"), ("", "SIGUSR1")]
)
def test_a_signal_that_a_script_has_passed_on_is_told_by_its_own_name(ends, tmp_path, written, told):
    (tmp_path / "code.signal").write_text(f"{written}\n")
    assert ends(_before_training, signal.SIGUSR1)[2].startswith(f"\n{told}: stopped before the first step")
    (tmp_path / "0").unlink()
    assert ends(_training, signal.SIGUSR1, signal.SIGINT)[2] == f"asked by {told}\n"


def _training(ready) -> None:
    signals = StopSignals()
    signals.check()
    ready(0)
    try:
        while True:
            signals.check()
            time.sleep(0.01)
    except StopRequest as request:
        print(f"asked by {request}", file=sys.stderr, flush=True)
    ready(1)
    time.sleep(1)
    os._exit(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_request_to_stop(ends, number):
    other = signal.SIGTERM if number == signal.SIGINT else signal.SIGINT
    code, _, printed = ends(_training, number, other)  # DeepSpeed's launcher answers Ctrl-C with SIGTERM
    assert (code, printed) == (0, f"asked by {number.name}\n")


def _told_both_at_once(ready) -> None:
    """Two signals that wait while a process is not running: the handler of the higher number runs first."""
    signals = StopSignals()
    both = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, both)
    for number in both:
        os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
    time.sleep(0.2)
    try:
        signals.check()
    except StopRequest as request:
        print(f"asked by {request}", file=sys.stderr, flush=True)
    os._exit(0)


def test_ctrl_c_is_told_where_the_launchers_answer_to_it_comes_first(ends):
    assert ends(_told_both_at_once)[2] == "asked by SIGINT\n"


def test_a_second_ctrl_c_ends_a_rank_at_once(ends):
    code, written, printed = ends(_training, signal.SIGINT, signal.SIGINT)
    assert (code, written) == (130, "130\n")
    assert printed == "asked by SIGINT\n\ninterrupted twice: ended without saving\n"
