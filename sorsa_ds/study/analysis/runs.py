"""What the pictures and tables of a run are made from."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.run.folder import read_metrics
from sorsa_ds.run.paths import METRICS, REPORT
from sorsa_ds.runtime.plotting import plain
from sorsa_ds.sorsa import regularizer
from sorsa_ds.sorsa.regularizer import Regularizer
from sorsa_ds.study.analysis.history import History, open_history
from sorsa_ds.study.analysis.table import Row, Table


@dataclass(frozen=True, slots=True)
class Run:
    """A run as it is shown. metrics: its lines of an optimizer step. rows: of all its steps and linears, once measured.

    reg: the regulariser that SORSA had; None with other methods.
    """

    name: str
    folder: Path
    history: History
    metrics: list[dict]
    reg: Regularizer | None
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, folder: Path, base: str | None = None) -> "Run":
        """Of a run's folder; nothing of it is measured yet.

        Raises:
            ValueError: as `open_history`; or its report or metrics lack something, naming the file.
        """
        history = open_history(folder, base)
        return cls(name, folder, history, _metrics(folder), _reg(history, folder / REPORT))

    @property
    def config(self) -> RunConfig:
        """Its settings as it ended."""
        return self.history.source.config

    @property
    def report(self) -> dict:
        """What it measured itself."""
        return self.history.source.report

    @property
    def what(self) -> str:
        """What it is: its method, or how it was regularised; as a picture's text."""
        if self.reg is None:
            return self.config.method
        every = f", orthonormal every {self.reg.reorthonormalize}" if self.reg.reorthonormalize else ""
        return rf"$\gamma / \eta_d$ = {self.reg.coefficient:.3g}, {self.reg.form}, {self.reg.reduction}{every}"

    @property
    def label(self) -> str:
        """Its name in a picture, with what it is."""
        return plain(self.name) if self.name == self.what else f"{plain(self.name)} ({self.what})"

    def rows_of(self, table: Table) -> list[Row]:
        """What a table has of its linears and steps as they are now; snapshots may have been removed since."""
        linears, steps = {target.name for target in self.history.linears}, {*self.history.steps}
        return [
            row
            for key, row in table.rows.items()
            if key.run == self.name and key.linear in linears and key.step in steps
        ]

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


def _metrics(folder: Path) -> list[dict]:
    lines = [line for line in read_metrics(folder) if "loss" in line]
    if not lines:
        raise ValueError(f"{folder / METRICS}: missing, or without the line of an optimizer step")
    return lines


def _reg(history: History, path: Path) -> Regularizer | None:
    """As the engine used it. Reports have not always told: then as the settings say, which a resumed run has rewritten.

    Raises:
        ValueError: the report tells none that there is.
    """
    source = history.source
    if source.config.method != "sorsa":
        return None
    if "regularizer" in source.report:
        try:
            return Regularizer(**source.report["regularizer"])
        except TypeError as error:
            raise ValueError(f"{path} is damaged: its regularizer is none of this program ({error})") from error
    return regularizer.resolve_regularizer(
        source.config.regularizer,
        learning_rate=source.config.train.learning_rate,
        accumulation_steps=source.config.train.gradient_accumulation_steps or 1,
    )
