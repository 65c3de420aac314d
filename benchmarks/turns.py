"""Sides that are timed in turns in one process: what disturbs the machine disturbs all of them."""

import statistics
import time
from collections.abc import Callable

import torch


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(sides: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each side in each round. Every round begins with another side."""
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            synchronise()
            began = time.perf_counter()
            sides[name]()
            synchronise()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Median of the rounds' ratios, and their quartiles: a disturbance that lasts is in both sides of a round."""
    quotients = [a / b for a, b in zip(ours, theirs, strict=True)]
    if len(quotients) < 2:
        return quotients[0], quotients[0], quotients[0]
    low, middle, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return middle, low, high
