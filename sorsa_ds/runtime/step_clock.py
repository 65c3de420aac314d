"""How an optimizer step's time divides among its parts, measured without making the host wait for the device."""

import itertools
import time
from collections import defaultdict

import torch


class StepClock:
    """Measures the parts of a step between `start` and `read`; at other times it does nothing.

    On a GPU a part lasts from one event in the current stream to the next, so it is the device's time with what it
    waited for; events are read when they have passed. On a CPU it is the host's time.

    Args:
        device: where the step is computed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] | None = None

    def start(self) -> None:
        """Measure from now on; the time until a part is entered belongs to none."""
        self._marks = []

    def enter(self, part: str) -> None:
        """The part that ran ends here, and this one begins; it may be entered several times."""
        if self._marks is not None:
            self._marks.append((part, self._now()))

    def leave(self) -> None:
        """The part that ran ends here, and none begins."""
        self.enter("")

    def read(self) -> dict[str, float]:
        """The seconds of each part that was entered and left, and measure no more.

        On a GPU the host must have waited for the device since the last part was left.
        """
        marks, self._marks = self._marks or [], None
        seconds: defaultdict[str, float] = defaultdict(float)
        for (part, begin), (_, end) in itertools.pairwise(marks):
            if part:
                seconds[part] += _between(begin, end)
        return dict(seconds)

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    """Seconds between two marks of the same kind."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin
