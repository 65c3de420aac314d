"""Mathematical answers are graded in a child process, which can be ended whatever it computes.

math-verify limits its time by signals. These work in a main thread only, and Python handles a signal only after the
operation that is under way: `9^{9^{9^9}}` would never be interrupted, and would take all memory meanwhile.
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
    """Grades one answer at a time. As a context manager it ends the child process on leaving.

    Args:
        seconds: how long one grading may take.
    """

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def grade(self, reference: str, answer: str) -> Outcome:
        """Whether the answer means the same as the reference, by the rules of `equality.grade_answer`.

        The outcome is `unparsable` where the answer is no expression, and `timeout` where comparing took too long: the
        answer does not count as right then.

        Raises:
            RuntimeError: the child process cannot be started.
        """
        if self._child is None:
            self._child = self._start()
        child = self._child
        assert child.stdin is not None
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps([reference, answer]) + "\n")
            child.stdin.flush()
        line = _next_line(child, self._seconds)
        if line:
            return json.loads(line)
        self._end()
        return "timeout" if line is None else "unparsable"  # a child that died has most likely run out of memory

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sorsa_ds.evaluate.grading.equality", str(_MEMORY)]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if not _next_line(child, _START_SECONDS):
            child.kill()
            raise RuntimeError(f"the grader does not start:\n{child.communicate()[1][-2000:]}")
        return child

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _next_line(child: subprocess.Popen[str], seconds: float) -> str | None:
    """The child's next line; empty where the child has ended, None where none comes within so many seconds."""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        return child.stdout.readline() if selector.select(seconds) else None
