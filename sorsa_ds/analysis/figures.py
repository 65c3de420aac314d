"""The papers' figures: how singular values and vectors move (2), and what the regulariser holds (3, 5)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sorsa_ds.analysis.runs import Run
from sorsa_ds.analysis.table import Row
from sorsa_ds.plotting import LOOKS, against_steps, picture, smoothed

_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
_MOST_NUMBERS = 80


@dataclass(frozen=True, slots=True)
class Picture:
    """One that is drawn. name: of its files, without suffix."""

    name: str
    title: str
    caption: str


def draw(runs: list[Run], output: Path) -> list[Picture]:
    """Write all figures as PNG and SVG; returns those that there are."""
    made = [_singular(runs, output), _swapping(runs, output), _training(runs, output)]
    if any(run.reg is not None for run in runs):
        made.append(_orthonormality(runs, output))
    made.append(_condition(runs, output))
    return made


def _singular(runs: list[Run], output: Path) -> Picture:
    """Figure 2: Delta-D against Delta-Sigma, a dot a linear and step."""
    moved = [row for run in runs for row in run.rows if row.key.step > 0]
    kinds = sorted({row.kind for row in moved})
    last = max((row.key.step for row in moved), default=1)
    columns = min(len(runs), 3)
    lines = -(-len(runs) // columns)
    crowded = max(sum(row.key.step > 0 for row in run.rows) for run in runs) > _MOST_NUMBERS
    size = (3.4 * columns + 1.3, 3.2 * lines + 0.5)
    with picture(output / "figure2", lines, columns, size, sharex=True, sharey=True) as (figure, axes):
        for ax, run in zip(axes, runs, strict=False):
            end = run.steps[-1]
            for kind, marker in zip(kinds, _MARKERS * len(kinds), strict=False):
                rows = [row for row in run.rows if row.key.step > 0 and row.kind == kind]
                dots = ax.scatter(
                    [row.figures.delta_sigma for row in rows], [row.figures.delta_d for row in rows],
                    c=[row.key.step for row in rows], cmap="cividis", vmin=0, vmax=last, marker=marker, s=22,
                    edgecolors="black", linewidths=0.3, label=kind,
                )  # fmt: skip
                for row in rows:
                    if row.key.block >= 0 and (row.key.step == end or not crowded):
                        place = (row.figures.delta_sigma, row.figures.delta_d)
                        ax.annotate(str(row.key.block), place, (3, 2), textcoords="offset points", fontsize=6)
            ax.set_title(run.label, fontsize=9)
            ax.grid(alpha=0.25, linewidth=0.5)
            ax.set(xlabel="ΔΣ (mean change of a singular value)", ylabel="ΔD (turn of singular vectors)")
            ax.label_outer()
        for ax in axes[len(runs) :]:
            ax.set_visible(False)
        if moved:
            figure.colorbar(dots, ax=axes, label="step", pad=0.01)
        if len(kinds) > 1:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    which = "the number of its block beside the last step's" if crowded else "the number of its block beside it"
    return Picture(
        "figure2", "Singular values and vectors (Figure 2)",
        f"ΔD (eq. 2 to 4) against ΔΣ (eq. 1) on merged weights: a dot a linear and step, {which}.",
    )  # fmt: skip


def _swapping(runs: list[Run], output: Path) -> Picture:
    """How much of Delta-D is only swapped order."""
    columns = min(len(runs), 3)
    lines = -(-len(runs) // columns)
    size = (3.2 * columns + 0.4, 2.9 * lines + 0.6)
    with picture(output / "swapping", lines, columns, size, sharey=True) as (figure, axes):
        for ax, run in zip(axes, runs, strict=False):
            literal, matched, subspace = (
                run.over_linears(lambda row, name=name: getattr(row.figures, name)).mean(axis=1)
                for name in ("delta_d", "delta_d_matched", "delta_d_subspace")
            )
            ax.fill_between(
                run.steps, 0, matched, color="#0072B2", alpha=0.75, linewidth=0, label="turned (matched ΔD)"
            )
            ax.fill_between(
                run.steps, matched, literal, facecolor="#E69F00", alpha=0.6, hatch="////", edgecolor="white",
                linewidth=0, label="only swapped order",
            )  # fmt: skip
            ax.plot(run.steps, literal, color="black", linewidth=1.4, label="ΔD as defined")
            ax.plot(run.steps, subspace, "o--", color="#D55E00", markersize=3, linewidth=1.2, label="leading subspace")
            ax.set_title(run.label, fontsize=9)
            ax.set_ylabel("ΔD, mean over linears")
            against_steps(ax, run.steps[-1])
            ax.label_outer()
        axes[0].set_ylim(bottom=0)
        for ax in axes[len(runs) :]:
            ax.set_visible(False)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return Picture(
        "swapping", "How much of ΔD is swapping",
        "ΔD as defined compares the i-th singular vector with the i-th one before; under the best one-to-one matching "
        "what is left is turn, the rest had only changed its place. The leading subspace is that of the first r triplets.",
    )  # fmt: skip


def _training(runs: list[Run], output: Path) -> Picture:
    """Figures 3 and 4: orthonormality, loss and gradient norm of every step."""
    measures = [("loss", "training loss (nats per token)"), ("grad_norm", "gradient norm")]
    if any(run.reg is not None for run in runs):
        forms = {f"{run.reg.form}, {run.reg.reduction}" for run in runs if run.reg is not None}
        measures.insert(0, ("reg_loss", f"L_reg ({' / '.join(sorted(forms))})"))
    last = max(line["step"] for run in runs for line in run.metrics)
    with picture(output / "figure3", 1, len(measures), (3.6 * len(measures), 3.6)) as (figure, axes):
        for ax, (key, what) in zip(axes, measures, strict=True):
            for run, (colour, style) in _looking(runs):
                points = [(line["step"], line[key]) for line in run.metrics if line.get(key) is not None]
                if points:
                    steps, values = zip(*points, strict=True)
                    if key != "reg_loss":
                        values = smoothed(np.array([values]), max(1, len(values) // 25))[0]
                    ax.plot(steps, values, color=colour, linestyle=style, linewidth=1.4, label=run.label)
            ax.set_ylabel(what)
            against_steps(ax, last)
            if key != "loss":
                ax.set_yscale("log")
        _legend(figure, axes, 1)
    return Picture(
        "figure3", "Orthonormality, loss and gradient norm (Figures 3 and 4)",
        "Of every optimizer step; loss and gradient norm as the mean over a twenty-fifth of the steps.",
    )  # fmt: skip


def _orthonormality(runs: list[Run], output: Path) -> Picture:
    """Figure 5: orthonormality of U and of V against steps."""
    _bands(runs, output / "figure5", [
        (f"‖{side}ᵀ{side} − I‖_F", lambda row, side=side: getattr(row.figures, f"orthonormality_{side.lower()}"))
        for side in "UV"
    ])  # fmt: skip
    return Picture(
        "figure5", "Orthonormality of U and V (Figure 5)",
        "Measured on the fp32 factors; line: mean over linears, band: lowest to highest.",
    )  # fmt: skip


def _condition(runs: list[Run], output: Path) -> Picture:
    """Condition numbers against steps."""
    _bands(runs, output / "condition", [
        (f"κ({name})", lambda row, side=side: getattr(row.figures, f"condition_{side}"))
        for name, side in (("U", "u"), ("V", "v"), ("W", "w"))
    ])  # fmt: skip
    return Picture(
        "condition", "Condition numbers (Theorem 5.6)",
        "Largest over smallest nonzero singular value; line: mean over linears, band: lowest to highest.",
    )  # fmt: skip


def _bands(runs: list[Run], path: Path, measures: list[tuple[str, Callable[[Row], float | None]]]) -> None:
    """Panels of figures against measured steps, the linears as a band; those that no run has are left out."""
    measures = [one for one in measures if any(run.over_linears(one[1]) is not None for run in runs)]
    with picture(path, 1, len(measures), (3.6 * len(measures) + 0.4, 3.6)) as (figure, axes):
        for ax, (what, value) in zip(axes, measures, strict=True):
            for run, (colour, style) in _looking(runs):
                found = run.over_linears(value)
                if found is not None:
                    low, high, mean = np.nanmin(found, 1), np.nanmax(found, 1), np.nanmean(found, 1)
                    ax.fill_between(run.steps, low, high, color=colour, alpha=0.12, linewidth=0)
                    ax.plot(run.steps, mean, color=colour, linestyle=style, marker=".", linewidth=1.4, label=run.label)
            ax.set_ylabel(what)
            ax.set_yscale("log")
            against_steps(ax, max(run.steps[-1] for run in runs))
        _legend(figure, axes, -1)


def _looking(runs: list[Run]) -> list[tuple[Run, tuple]]:
    """Each run with its colour and line style, the same in every picture."""
    return [(run, LOOKS[i % len(LOOKS)]) for i, run in enumerate(runs)]


def _legend(figure, axes: list, of: int) -> None:
    handles, labels = axes[of % len(axes)].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
