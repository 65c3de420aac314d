"""Mathematical answers are graded in a child process, which can be ended whatever it computes.

math-verify limits its time by signals. These work in a main thread only, and Python handles a signal only after the
operation that is under way: `9^{9^{9^9}}` would never be interrupted, and would take all memory meanwhile.
"""

from typing import Literal

from sorsa_ds.runtime.line_process import LineProcess

Outcome = Literal["right", "wrong", "unparsable", "timeout"]

SECONDS = 10.0
_MEMORY = 4 * 2**30


class Grader:
    """Grades one answer at a time. As a context manager it ends the child process on leaving.

    Args:
        seconds: how long one grading may take.
    """

    def __init__(self, seconds: float = SECONDS):
        self._process = LineProcess("sorsa_ds.evaluate.grading.equality", seconds=seconds, memory=_MEMORY)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_) -> None:
        self._process.end()

    def grade(self, reference: str, answer: str) -> Outcome:
        """Whether the answer means the same as the reference, by the rules of `equality.grade_answer`.

        The outcome is `unparsable` where the answer is no expression, and `timeout` where comparing took too long: the
        answer does not count as right then.

        Raises:
            RuntimeError: the child process cannot be started.
        """
        try:
            return self._process.ask([reference, answer])
        except TimeoutError:
            return "timeout"
        except ChildProcessError:  # most likely it has run out of memory
            return "unparsable"
