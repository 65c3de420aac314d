"""Mathematical answers graded in a child process, which can be ended whatever it computes.

math-verify keeps its own time by signals, which works in a main thread only, and a Python signal waits for the
operation that is under way: `9^{9^{9^9}}` would never be interrupted, and takes all memory meanwhile.
"""

import json
import selectors
import subprocess
import sys
from contextlib import suppress
from typing import Literal

Outcome = Literal["right", "wrong", "unparsable", "timeout"]

SECONDS = 10.0
_START_SECONDS = 300.0  # importing sympy, on a machine that is busy
_MEMORY = 4 * 2**30


class Grader:
    """Grades one answer at a time; a context manager, which ends the child process.

    Args:
        seconds: how long one grading may take.
    """

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds
        self._child: subprocess.Popen | None = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def grade(self, reference: str, answer: str) -> Outcome:
        """Whether the answer means the same as the reference (`sorsa_ds.evaluate.grading.equality`).

        `unparsable`: the answer is no expression. `timeout`: comparing took too long; the answer does not count.

        Raises:
            RuntimeError: the child process cannot be started.
        """
        if self._child is None:
            self._start()
        with suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps([reference, answer]) + "\n")
            self._child.stdin.flush()
        line = self._read(self._seconds)
        if line:
            return json.loads(line)
        self._end()
        return "timeout" if line is None else "unparsable"  # else it died, most likely for want of memory

    def _start(self) -> None:
        command = [sys.executable, "-m", "sorsa_ds.evaluate.grading.equality", str(_MEMORY)]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if not self._read(_START_SECONDS):
            self._child.kill()
            raise RuntimeError(f"the grader does not start:\n{self._child.communicate()[1][-2000:]}")

    def _read(self, seconds: float) -> str | None:
        """The next line; empty where the child has ended, None where it takes longer."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            return self._child.stdout.readline() if selector.select(seconds) else None

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None
