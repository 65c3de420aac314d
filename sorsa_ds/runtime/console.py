"""What a person sees while a command runs: printed lines and progress bars, as a rule from rank 0 only.

Much of it is text of others: rows of data, names of files, answers of models, errors of libraries. Whatever may hold
such text is printed by `say` and `note`, or made `printable` first, so that it cannot command the terminal.
"""

import argparse
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from tqdm import tqdm

# tqdm's own lock is shared between processes: a semaphore that is left behind where a process ends at once.
tqdm.set_lock(threading.RLock())

_CONTROLS = (
    *(code for code in range(0x20) if chr(code) not in "\n\t"),
    *range(0x7F, 0xA0),
    *(0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # change the direction of writing
    *(0x2028, 0x2029),  # separate lines and paragraphs
    *range(0xD800, 0xE000),  # halves of surrogate pairs, which cannot be written as UTF-8
)
_DETAILS = "SORSA_VERBOSE"
"""The environment variable that asks for details."""

_ESCAPED = {code: ascii(chr(code))[1:-1] for code in _CONTROLS}


def printable(text: str) -> str:
    r"""The text with all control characters but newlines and tabs escaped, as in `\x1b`.

    These are what terminals obey: C0, DEL, C1 and the controls that change the direction of writing.
    """
    return text.translate(_ESCAPED)


def _rank() -> int:
    """The rank of this process by its launcher's word, which is there before PyTorch is imported."""
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    """Print a line on rank 0, above a running progress bar. Control characters are escaped."""
    if _rank() == 0:
        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()


def say_details(text: str) -> None:
    """`say` what is only of interest to those who ask for details (`--verbose`)."""
    if _DETAILS in os.environ:
        say(text)


def ask_for_details() -> None:
    """Let `say_details` print, in this process and in those that it starts."""
    os.environ[_DETAILS] = "1"


def in_red(text: str) -> str:
    """The text as an error looks on a terminal; unchanged where stderr is none, or where NO_COLOR is set."""
    return f"\x1b[31m{text}\x1b[0m" if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else text


def aside(text: str) -> None:
    """Print a line on rank 0 to stderr, where it is no part of what a command gives. See `say`."""
    if _rank() == 0:
        tqdm.write(printable(text), file=sys.stderr)


def note(text: str) -> None:
    """Print a line on this rank, whichever it is, to stderr and with the rank in front. See `say`."""
    tqdm.write(printable(f"[rank {_rank()}] {text}"), file=sys.stderr)


def bar(total: float, what: str, unit: str, done: int = 0, hidden: bool = False, stays: bool = True) -> tqdm:
    """A progress bar with an estimate of the time left. It is shown on rank 0 only, unless it is `hidden` there too.

    Args:
        stays: whether it is left on the screen when it is full.
    """
    hidden = hidden or _rank() != 0
    percent = "{l_bar}{bar}| [{elapsed}<{remaining}]" if unit == "%" else None
    return tqdm(
        total=total, initial=done, desc=what, unit=unit, disable=hidden, dynamic_ncols=True, file=sys.stderr,
        bar_format=percent, leave=stays,
    )  # fmt: skip


def tracked(items: Iterable, total: int, what: str, unit: str, stays: bool = True) -> Iterable:
    """Iterate over items behind a progress bar that counts them. See `bar`."""
    with bar(total, what, unit, stays=stays) as progress:
        for item in items:
            yield item
            progress.update()


def tracked_by_cost(items: Sequence, costs: Sequence[float], what: str) -> Iterable:
    """Iterate over items of unequal cost behind a progress bar that shows the percentage of the total cost done."""
    with bar(sum(costs), what, "%") as progress:
        for item, cost in zip(items, costs, strict=True):
            yield item
            progress.update(cost)


class OptionParser(argparse.ArgumentParser):
    """Python's parser of options; its errors repeat words of the command line, and escape their control characters."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(status, None if message is None else printable(message))


class _Outlet(io.FileIO):
    """A stream whose reader may leave, as `| head` does after some lines. What is written then goes nowhere."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # also for the processes that this one starts
            os.close(nowhere)
            return super().write(data)


def outlive_readers() -> None:
    """Let a command go on with its work where nobody reads what it prints: its stdout or stderr is a closed pipe.

    A stream that is closed from the start goes nowhere, too.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(io.FileIO(os.devnull, "w"))))
        elif stream is getattr(sys, f"__{name}__"):
            stream.flush()
            outlet = _Outlet(stream.fileno(), "w", closefd=False)
            wrapped = io.TextIOWrapper(
                outlet if stream.write_through else io.BufferedWriter(outlet),  # type: ignore[type-var]
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, wrapped)


def quiet_libraries() -> None:
    """Silence what libraries print below the level of a warning, so that the console belongs to the run."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    quiet_data_libraries()


def quiet_data_libraries() -> None:
    """`quiet_libraries` for a command that does without DeepSpeed, whose import takes seconds."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


def on_one_line(text: str) -> str:
    """The text with all control characters escaped, newlines and tabs too."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns, from rows of as many cells each, which are put on one line."""
    cells = [[on_one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def table(rows: list[tuple[str, str]]) -> str:
    """Lines of two aligned columns, from (name, value) pairs."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
