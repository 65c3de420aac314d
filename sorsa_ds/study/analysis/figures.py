"""The papers' figures: how singular values and vectors move (2), and what the regulariser does (3 and 5)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sorsa_ds.runtime.plotting import LOOKS, against_steps, apart, legend, picture, plain, scaled, smoothed, sparse
from sorsa_ds.study.analysis.runs import Run

_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
_MOST_NUMBERS = 80


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that was drawn.

    name: the name of the picture's files, without suffix.
    """

    name: str
    title: str
    caption: str


def draw_figures(runs: list[Run], output: Path) -> list[Picture]:
    """Write all figures as PNG and SVG; returns those that these runs have."""
    made = [_singular(runs, output), _swapping(runs, output), _training(runs, output)]
    if any(run.reg is not None for run in runs):
        made.append(_orthonormality(runs, output))
    made.append(_condition(runs, output))
    return made


def _singular(runs: list[Run], output: Path) -> Picture:
    """Draw Figure 2: Delta-D against Delta-Sigma, with one dot per linear and step."""
    moved = [row for run in runs for row in run.rows if row.key.step > 0]
    kinds = sorted({row.kind for row in moved})
    last = max(row.key.step for row in moved)
    crowded = max(len(run.rows) for run in runs) > _MOST_NUMBERS
    shown = {}
    with _panels(runs, output / "figure2", sharex=True) as (figure, axes):
        for ax, run in zip(axes, runs, strict=True):
            for i, kind in enumerate(kinds):
                rows = [row for row in run.rows if row.key.step > 0 and row.kind == kind]
                if not rows:
                    continue
                places = [(row.figures.delta_sigma, row.figures.delta_d) for row in rows]
                shown[plain(kind)] = dots = ax.scatter(
                    *zip(*places, strict=True), c=[row.key.step for row in rows],
                    cmap="cividis", vmin=0, vmax=last, marker=_MARKERS[i % len(_MARKERS)], s=22, edgecolors="black",
                    linewidths=0.3,
                )  # fmt: skip
                for row, place in zip(rows, places, strict=True):
                    if row.key.block >= 0 and (row.key.step == run.steps[-1] or not crowded):
                        ax.annotate(str(row.key.block), place, (3, 2), textcoords="offset points", fontsize=6)
            ax.grid(alpha=0.25, linewidth=0.5)
            ax.set(xlabel="ΔΣ (mean change of a singular value)", ylabel="ΔD (turn of singular vectors)")
        scaled(axes[0].xaxis, [row.figures.delta_sigma for row in moved])
        scaled(axes[0].yaxis, [row.figures.delta_d for row in moved])
        figure.colorbar(dots, ax=axes, label="step", pad=0.01)
        apart(axes[0].xaxis)
        if len(kinds) > 1:
            legend(figure, dict(sorted(shown.items())))
    which = "the number of its block beside the last step's" if crowded else "the number of its block beside it"
    return Picture(
        "figure2", "Singular values and vectors (Figure 2)",
        f"ΔD (eq. 2 to 4) against ΔΣ (eq. 1) on merged weights: one dot per linear and step, {which}.",
    )  # fmt: skip


def _swapping(runs: list[Run], output: Path) -> Picture:
    """Draw how much of Delta-D is swapped order, how much mixing of nearly equal triplets, and how much real turn."""
    with _panels(runs, output / "swapping") as (figure, axes):
        for ax, run in zip(axes, runs, strict=True):
            literal, matched, clustered, subspace = (
                _mean(run, f"delta_d{which}") for which in ("", "_matched", "_clustered", "_subspace")
            )
            parts = {"edgecolor": "white", "linewidth": 0}
            ax.fill_between(run.steps, 0, clustered, color="#0072B2", alpha=0.75, linewidth=0, label="turned")
            ax.fill_between(
                run.steps, clustered, matched, facecolor="#56B4E9", alpha=0.6, hatch="....", **parts,
                label="mixed among nearly equal",
            )  # fmt: skip
            ax.fill_between(
                run.steps, matched, literal, facecolor="#E69F00", alpha=0.6, hatch="////", **parts,
                label="only swapped order",
            )  # fmt: skip
            ax.plot(run.steps, literal, color="black", linewidth=1.4, label="ΔD as defined")
            ax.plot(run.steps, subspace, "o--", color="#D55E00", markersize=3, linewidth=1.2, label="leading subspace")
            told = f"at the end ΔD = {literal[-1]:.2g},\n{run.means_at_end()['swapping']:.0%} of it no turn"
            ax.text(0.04, 0.97, told, transform=ax.transAxes, va="top", fontsize=8)
            ax.set_ylabel("ΔD, mean over linears")
            against_steps(ax, run.steps[-1])
        axes[0].set_ylim(0, 1.3 * axes[0].get_ylim()[1])
        handles, labels = axes[0].get_legend_handles_labels()
        legend(figure, dict(zip(labels, handles, strict=True)))
    return Picture(
        "swapping", "How much of ΔD is swapping",
        "ΔD as defined compares the i-th singular vector with the i-th one before. Under the best one-to-one matching "
        "what had only changed its place counts nothing (swapped). Taking partners with nearly equal singular values "
        "as one subspace, neither does a change of basis inside it (mixed). The rest is turn. The leading subspace: of "
        "the first r triplets.",
    )  # fmt: skip


def _mean(run: Run, figure: str) -> np.ndarray:
    """The mean over linears of a figure that every method has, (steps,)."""
    values = run.over_linears(figure)
    assert values is not None, "every method has weights, which this figure is of"
    return values.mean(axis=1)


def _training(runs: list[Run], output: Path) -> Picture:
    """Draw Figures 3 and 4: orthonormality, loss and gradient norm of every step."""
    measures = [("loss", "training loss (nats per token)"), ("grad_norm", "gradient norm")]
    if forms := {f"{run.reg.form}, {run.reg.reduction}" for run in runs if run.reg is not None}:
        measures.insert(0, ("reg_loss", rf"$L_\mathrm{{reg}}$ ({' / '.join(sorted(forms))})"))
    last = max(line["step"] for run in runs for line in run.metrics)
    shown = {}
    with picture(output / "figure3", 1, len(measures), (3.6 * len(measures), 3.6)) as (figure, axes):
        for ax, (key, what) in zip(axes, measures, strict=True):
            later = []
            for run, (colour, style) in _looking(runs):
                points = [(line["step"], line[key]) for line in run.metrics if line.get(key) is not None]
                if not points:
                    continue
                steps, values = np.array(points).T
                if key != "reg_loss":
                    values = smoothed(values[None], max(1, len(values) // 25))[0]
                [shown[run.label]] = ax.plot(steps, values, color=colour, linestyle=style, linewidth=1.4)
                later += [*values[1:]]
            ax.set_ylabel(what)
            scaled(ax.yaxis, later)
            against_steps(ax, last)
        _legend(figure, shown, runs)
    return Picture(
        "figure3", "Orthonormality, loss and gradient norm (Figures 3 and 4)",
        "Of every optimizer step; loss and gradient norm as the mean over a twenty-fifth of the steps. Before the "
        "first step L_reg is rounding, which may lie below the axis.",
    )  # fmt: skip


def _orthonormality(runs: list[Run], output: Path) -> Picture:
    """Draw Figure 5: orthonormality of U and of V against steps."""
    measures = {rf"$\|{side}^\top {side} - I\|_F$": f"orthonormality_{side.lower()}" for side in "UV"}
    _bands(runs, output / "figure5", measures)
    return Picture(
        "figure5", "Orthonormality of U and V (Figure 5)",
        "Measured on the fp32 factors; line: mean over linears, band: lowest to highest. At step 0 it is rounding, "
        "which may lie below the axis.",
    )  # fmt: skip


def _condition(runs: list[Run], output: Path) -> Picture:
    """Draw condition numbers against steps."""
    measures = {r"$\kappa(U)$": "condition_u", r"$\kappa(V)$": "condition_v"}
    relative = {r"$\kappa(W_t)\ /\ \kappa(W_0)$": "condition_w"}
    _bands(runs, output / "condition", measures | relative, relative)
    return Picture(
        "condition", "Condition numbers (Theorem 5.6)",
        "Largest over smallest nonzero singular value, that of the merged weight against its own at the start; line: "
        "mean over linears, band: lowest to highest.",
    )  # fmt: skip


def _bands(runs: list[Run], path: Path, measures: dict[str, str], relative: dict[str, str] | None = None) -> None:
    """Draw one panel per figure against the measured steps, with the linears as a band.

    Args:
        measures: label -> name of the figure in the table. A figure that no run has gets no panel.
        relative: the entries of `measures` whose values are divided by those at the start.
    """
    found = {what: [run.over_linears(name) for run in runs] for what, name in measures.items()}
    found = {what: one for what, one in found.items() if any(values is not None for values in one)}
    shown = {}
    with picture(path, 1, len(found), (3.6 * len(found) + 0.4, 3.6)) as (figure, axes):
        for ax, (what, of_runs) in zip(axes, found.items(), strict=True):
            later = []
            for (run, (colour, style)), values in zip(_looking(runs), of_runs, strict=True):
                if values is None:
                    continue
                if what in (relative or {}):
                    values = values / values[0]
                ax.fill_between(run.steps, values.min(1), values.max(1), color=colour, alpha=0.12, linewidth=0)
                [shown[run.label]] = ax.plot(
                    run.steps, values.mean(1), color=colour, linestyle=style, marker=".", markevery=sparse(len(values))
                )
                later += [*values[1:].flat]
            ax.set_ylabel(what)
            scaled(ax.yaxis, later)
            against_steps(ax, max(run.steps[-1] for run in runs))
        _legend(figure, shown, runs)


@contextmanager
def _panels(runs: list[Run], path: Path, **subplots) -> Iterator[tuple]:
    """Context with (figure, axes), one panel per run, all with the same vertical scale."""
    count = len(runs)
    columns = 2 if count == 4 else min(count, 3)
    lines = -(-count // columns)
    size = (3.3 * columns + 1.0, 3.0 * lines + 0.6)
    with picture(path, lines, columns, size, sharey=True, **subplots) as (figure, axes):
        for ax in axes[count:]:
            ax.remove()
        yield figure, axes[:count]
        for i, (ax, run) in enumerate(zip(axes, runs, strict=False)):
            ax.set_title(run.label if run.name == run.what else f"{plain(run.name)}\n{run.what}", fontsize=9)
            ax.label_outer()
            if i + columns >= count:  # there is no panel below this one
                ax.tick_params(labelbottom=True)
                ax.set_xlabel(axes[count - 1].get_xlabel())


def _looking(runs: list[Run]) -> list[tuple[Run, tuple]]:
    """Each run with its colour and line style, the same in every picture."""
    return [(run, LOOKS[i % len(LOOKS)]) for i, run in enumerate(runs)]


def _legend(figure, shown: dict, runs: list[Run]) -> None:
    """Add a legend of the runs' lines, in the runs' order. `shown`: label -> line, of the runs that have one."""
    legend(figure, {run.label: shown[run.label] for run in runs if run.label in shown})
