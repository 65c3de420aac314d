"""What the pictures and tables of a run are made from."""

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
        if self.reg is not None:
            return rf"{self.name} ($\gamma / \eta_d$ = {self.reg.coefficient:.3g})"
        return self.name if self.name == self.config.method else f"{self.name} ({self.config.method})"

    @property
    def steps(self) -> list[int]:
        """The measured steps."""
        return sorted({row.key.step for row in self.rows})

    def over_linears(self, figure: str) -> np.ndarray | None:
        """One of `table.Figures` as (steps, linears); None where this method has none."""
        at = {(row.key.step, row.key.block, row.key.linear): getattr(row.figures, figure) for row in self.rows}
        linears = sorted({place[1:] for place in at})
        found = np.array([[at[(step, *linear)] for linear in linears] for step in self.steps], dtype=float)
        return None if np.isnan(found).all() else found
