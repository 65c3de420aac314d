"""A child process that answers questions, and that can be ended whatever it computes.

Neither a signal nor an exception interrupts Python inside one operation, such as `9**9**9**9`, and no other thread can.
What others wrote, an expression or a template, is therefore computed in a process of its own, under limits of time and
memory. Questions and answers are lines of JSON, so that the child cannot make its parent run anything.
"""

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

_START_SECONDS = 300.0  # importing a library, on a machine that is busy


class LineProcess:
    """Asks a child process, which is started when it is needed: at the first question, and again after it was ended.

    Args:
        module: the name of the module that is the child's program; it calls `serve`.
        seconds: how long one answer may take.
        memory: the bytes that the child may take beyond what it has at its start.
    """

    def __init__(self, module: str, *, seconds: float, memory: int) -> None:
        self._command = [sys.executable, "-P", "-m", module, str(seconds), str(memory)]
        self._seconds = seconds
        self._child: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, question: Any) -> Any:
        """The child's answer, which is anything that JSON can hold.

        Args:
            question: what JSON cannot hold of it arrives as the name of its type, as in `<datetime>`.

        Raises:
            TimeoutError: the answer took too long; the child is ended.
            ChildProcessError: the child has ended by itself, most likely for want of memory.
            RuntimeError: the child does not start. The message has what it printed.
        """
        if self._child is None or self._owner != os.getpid():  # a forked process must not share its parent's pipes
            self._child, self._owner = self._start(), os.getpid()
        child = self._child
        assert child.stdin is not None
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps(question, default=_placeholder) + "\n")
            child.stdin.flush()
        line = _next_line(child, self._seconds)
        if line:
            return json.loads(line)
        self.end()
        if line is None:
            raise TimeoutError(f"no answer within {self._seconds:g} s")
        raise ChildProcessError(f"exit code {child.returncode}")

    def end(self) -> None:
        """End the child, if there is one."""
        if self._child is not None and self._owner == os.getpid():
            self._child.kill()
            self._child.communicate()
        self._child = None

    def _start(self) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if not _next_line(child, _START_SECONDS):
            child.kill()
            raise RuntimeError(f"{' '.join(self._command)} does not start:\n{child.communicate()[1][-2000:]}")
        return child


def serve(answer: Callable[[Any], Any]) -> None:
    """Answer questions until the input ends: this is the child's side, which takes its limits from its command line.

    Ctrl-C is for the parent to handle. A parent that was killed ends no child: an alarm of the system does.
    """
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit = psutil.Process().memory_info().vms + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        print(json.dumps(answer(json.loads(line))), flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _placeholder(value: object) -> str:
    return f"<{type(value).__name__}>"


def _next_line(child: subprocess.Popen[str], seconds: float) -> str | None:
    """The child's next line; empty where the child has ended, None where none comes within so many seconds."""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        return child.stdout.readline() if selector.select(seconds) else None
