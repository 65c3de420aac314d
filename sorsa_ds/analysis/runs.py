"""What the pictures and tables of a run are made from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sorsa_ds import regularizer
from sorsa_ds.analysis.history import History
from sorsa_ds.analysis.table import Row
from sorsa_ds.config import RunConfig
from sorsa_ds.regularizer import Regularizer
from sorsa_ds.run_folder import read_metrics


@dataclass(frozen=True, slots=True)
class Run:
    """A run as it is shown. rows: of all its steps and linears. metrics: its lines of an optimizer step.

    reg: the regulariser that SORSA had; None with other methods.
    """

    name: str
    config: RunConfig
    report: dict
    rows: list[Row]
    metrics: list[dict]
    reg: Regularizer | None

    @classmethod
    def of(cls, name: str, folder: Path, history: History, rows: list[Row]) -> "Run":
        """Of a run's folder and what was measured of it."""
        config, reg = history.source.config, None
        if config.method == "sorsa":
            reg = regularizer.resolve(
                config.regularizer,
                learning_rate=config.train.learning_rate,
                accumulation_steps=config.train.gradient_accumulation_steps or 1,
            )
        metrics = [line for line in read_metrics(folder) if "loss" in line]
        return cls(name, config, history.source.report, rows, metrics, reg)

    @property
    def label(self) -> str:
        """Its name in a picture, with what it is."""
        if self.reg is None:
            return f"{self.name} ({self.config.method})"
        return f"{self.name} (γ/η_d = {self.reg.coefficient:.3g})"

    @property
    def steps(self) -> list[int]:
        """The measured steps."""
        return sorted({row.key.step for row in self.rows})

    def over_linears(self, value: Callable[[Row], float | None]) -> np.ndarray | None:
        """A figure as (steps, linears), NaN where it is missing; None where no row has it."""
        columns = sorted({(row.key.block, row.key.linear) for row in self.rows})
        found = np.full((len(self.steps), len(columns)), np.nan)
        for row in self.rows:
            if (number := value(row)) is not None:
                place = (self.steps.index(row.key.step), columns.index((row.key.block, row.key.linear)))
                found[place] = number
        return None if np.isnan(found).all() else found
