"""Sides that are timed in turns in one process, so that what disturbs the machine disturbs all of them."""

import statistics
import time
from collections.abc import Callable

import torch


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Turns:
    """Runs the sides in turns and keeps the seconds of each.

    The first `warm_up` rounds are not kept. Every round begins with another side, and with the same one on all ranks.
    """

    def __init__(self, sides: dict[str, Callable[[], object]], warm_up: int = 1):
        self._sides, self._left, self._round = sides, warm_up, 0
        self.seconds: dict[str, list[float]] = {name: [] for name in sides}

    def take(self) -> None:
        """Run one round, after the rounds of warm-up where these have not been run."""
        while True:
            names = list(self._sides)
            first = self._round % len(names)
            self._round += 1
            for name in names[first:] + names[:first]:
                synchronise()
                began = time.perf_counter()
                self._sides[name]()
                synchronise()
                if not self._left:
                    self.seconds[name].append(time.perf_counter() - began)
            if not self._left:
                return
            self._left -= 1


def in_turns(sides: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """The seconds of each side in each round."""
    turns = Turns(sides, warm_up)
    for _ in range(rounds):
        turns.take()
    return turns.seconds


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the rounds' ratios.

    A disturbance that lasts is in both sides of a round, and so not in their ratio.
    """
    quotients = [a / b for a, b in zip(ours, theirs, strict=True)]
    if len(quotients) < 2:
        return quotients[0], quotients[0], quotients[0]
    low, middle, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return middle, low, high
