"""The results of a comparison: figures of each run and of each method over its seeds, and the best learning rates."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.run.finished import FinishedRun
from sorsa_ds.study.compare.trials import Trial

HELD_OUT = "eval_loss_end"


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation of a figure over seeds; a single value has no deviation."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """The spread of the values that are not None; None where there is no such value."""
        numbers = [value for value in values if value is not None]
        if not numbers:
            return None
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
        return cls(statistics.fmean(numbers), deviation, len(numbers))


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: its report, and its model's score in the task where one was asked for."""

    trial: Trial
    folder: Path
    report: dict
    score: float | None = None

    @classmethod
    def read(cls, trial: Trial, folder: Path) -> "Result":
        """The result in a finished run's folder, without a score."""
        return cls(trial, folder, FinishedRun(folder).report())

    @property
    def criterion(self) -> float:
        """The loss that learning rates are compared by: on held-out data, or in training where nothing is held out."""
        held_out = self.report[HELD_OUT]
        return self.report["loss_last"] if held_out is None else held_out


@dataclass(frozen=True, slots=True)
class MethodResult:
    """A method at its best learning rate. runs: one per seed."""

    method: str
    learning_rate: float
    runs: list[Result]

    def spread(self, key: str) -> Spread | None:
        """The spread of one figure of the runs' reports."""
        return Spread.of(run.report.get(key) for run in self.runs)

    @property
    def score(self) -> Spread | None:
        """The spread of the runs' scores, in the task's unit."""
        return Spread.of(run.score for run in self.runs)


def best_rate(runs: Iterable[Result], method: str, seed: int) -> float | None:
    """The learning rate with the lowest criterion among a method's runs of this seed; None where none is finished."""
    tried = [run for run in runs if run.trial.method == method and run.trial.seed == seed]
    return min(tried, key=lambda run: run.criterion).trial.learning_rate if tried else None


def by_method(runs: list[Result], methods: Iterable[str], rate_of: Callable[[str], float | None]) -> list[MethodResult]:
    """Each method's runs at its best rate, in the order of `methods`; a method without a rate is left out."""
    found = []
    for method in methods:
        rate = rate_of(method)
        if rate is not None:
            chosen = [run for run in runs if (run.trial.method, run.trial.learning_rate) == (method, rate)]
            found.append(MethodResult(method, rate, chosen))
    return found
