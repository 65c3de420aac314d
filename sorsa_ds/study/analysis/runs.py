"""A run as the pictures and tables of an analysis show it."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.run.metrics import read_metrics
from sorsa_ds.run.paths import METRICS, REPORT
from sorsa_ds.runtime.plotting import plain
from sorsa_ds.sorsa.regularizer import Regularizer
from sorsa_ds.study.analysis.history import History, open_history
from sorsa_ds.study.analysis.measures import swapping_share
from sorsa_ds.study.analysis.table import Figures, Row, Table


@dataclass(frozen=True, slots=True)
class Run:
    """A run as it is shown.

    metrics: the lines that optimizer steps have written.
    reg: SORSA's regulariser; None for other methods.
    rows: the rows of all steps and linears; empty before they are measured.
    """

    name: str
    folder: Path
    history: History
    metrics: list[dict]
    reg: Regularizer | None
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, folder: Path, base: str | None = None, trust_remote_code: bool = False) -> "Run":
        """The run of a folder, before anything of it is measured.

        Args:
            base: folder or hub name of the base model, where it has moved.
            trust_remote_code: allow Python code that comes with the base model, where the run was trained with it.

        Raises:
            ValueError: the folder holds no finished run, a file of it is damaged, the base model has other layers, or
                the report or the metrics lack something.
        """
        history = open_history(folder, base, trust_remote_code)
        return cls(name, folder, history, _metrics(folder), _reg(history, folder / REPORT))

    @property
    def config(self) -> RunConfig:
        """The settings with which the run ended."""
        return self.history.source.config

    @property
    def report(self) -> dict:
        """The figures that training has measured."""
        return self.history.source.report

    @property
    def what(self) -> str:
        """A picture's text on the run: its method, or how it was regularised."""
        if self.reg is None:
            return self.config.method
        every = f", orthonormal every {self.reg.reorthonormalize}" if self.reg.reorthonormalize else ""
        return rf"$\gamma / \eta_d$ = {self.reg.coefficient:.3g}, {self.reg.form}, {self.reg.reduction}{every}"

    @property
    def label(self) -> str:
        """The run's name in a picture, followed by `what`."""
        return plain(self.name) if self.name == self.what else f"{plain(self.name)} ({self.what})"

    def rows_of(self, table: Table) -> list[Row]:
        """The table's rows of those linears and steps that the run has now; snapshots may have been removed since."""
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
        """One of `table.Figures` as an array (steps, linears); None where the run's method has no such figure."""
        at = {(row.key.step, row.key.block, row.key.linear): getattr(row.figures, figure) for row in self.rows}
        linears = sorted({place[1:] for place in at})
        found = np.array([[at[(step, *linear)] for linear in linears] for step in self.steps], dtype=float)
        return None if np.isnan(found).all() else found

    def means_at_end(self) -> dict[str, float | None]:
        """Each of `table.Figures` at the last step as the mean over linears; None where the run's method has no such.

        `swapping` is the share of the mean Delta-D. The mean of the linears' shares would be another number, in which a
        linear that has hardly moved counts as much as one that has turned far.
        """
        end = self.steps[-1]
        at_end = [row.figures for row in self.rows if row.key.step == end]
        means: dict[str, float | None] = {}
        for name in (one.name for one in fields(Figures)):
            found = [value for figures in at_end if (value := getattr(figures, name)) is not None]
            means[name] = float(np.mean(found)) if found else None
        literal, clustered = means["delta_d"], means["delta_d_clustered"]
        assert literal is not None and clustered is not None, "every method has weights, which these figures are of"
        return means | {"swapping": swapping_share(literal, clustered)}


def _metrics(folder: Path) -> list[dict]:
    lines = [line for line in read_metrics(folder) if "loss" in line]
    if not lines:
        raise ValueError(f"{folder / METRICS}: missing, or without the line of an optimizer step")
    return lines


def _reg(history: History, path: Path) -> Regularizer | None:
    """The regulariser that the engine used; None where the method has none.

    Older reports do not have it. Then it is made from the settings, which a resumed run may have rewritten.

    Raises:
        ValueError: the report has one that this program does not know.
    """
    source = history.source
    reg = source.method.regularizer(source.config)
    if reg is not None and "regularizer" in source.report:
        try:
            return Regularizer(**source.report["regularizer"])
        except TypeError as error:
            raise ValueError(f"{path} is damaged: its regularizer is none of this program ({error})") from error
    return reg
