"""The pictures of a comparison, in which a method has one colour and one line style.

Loss and gradient norm against steps, as in Figure 4 of the papers, with the seeds as a band; and, where drift was
measured, held-out loss against drift with a curve per method over its learning rates.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from sorsa_ds.run.metrics import read_metrics
from sorsa_ds.runtime import plotting
from sorsa_ds.runtime.plotting import against_steps, legend, picture, scaled, smoothed
from sorsa_ds.study.compare.frontier import Frontier, Point
from sorsa_ds.study.compare.results import MethodResult
from sorsa_ds.study.compare.trials import METHODS

Look = tuple[str, Any, str]
"""Colour, line style and marker of a curve. By the last two it can be told apart in black and white too."""


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, in order."""
    looks = zip(names, cycle(plotting.LOOKS), cycle("osD^vP*Xp"), strict=False)
    return {name: (*look, marker) for name, look, marker in looks}


LOOKS = looks_of(METHODS)
"""The look of each method, the same in every picture."""
_ROWS = 14
"""How many names of methods have room above one another beside the frontier."""


def curves(method: MethodResult, key: str) -> np.ndarray:
    """One column of the runs' metrics, an array (seeds, steps), without the steps that not every run has."""
    columns = [[line[key] for line in read_metrics(run.folder) if "loss" in line] for run in method.runs]
    return np.array([column[: min(map(len, columns))] for column in columns])


def draw_comparison(methods: list[MethodResult], output: Path) -> None:
    """Write comparison.png and comparison.svg; nothing is written where no run is finished."""
    if not methods:
        return
    steps = min(curves(method, "loss").shape[1] for method in methods)
    window = max(1, steps // 25)
    mean = [f"mean of {window} steps"] if window > 1 else []
    several = any(len(method.runs) > 1 for method in methods)
    with picture(output / "comparison", 1, 2, size=(9.5, 3.9)) as (figure, axes):
        for ax, key, what, unit in zip(
            axes, ("loss", "grad_norm"), ("training loss", "gradient norm"), (["nats per token"], []), strict=True
        ):
            for method in methods:
                colour, style, _ = LOOKS[method.method]
                values = smoothed(curves(method, key), window)
                x = np.arange(1, values.shape[1] + 1)
                name = f"{method.method} (rate {method.learning_rate:g})"
                ax.plot(x, values.mean(axis=0), color=colour, linestyle=style, linewidth=1.6, label=name)
                if len(values) > 1:
                    ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)
            details = ", ".join(unit + mean)
            ax.set_ylabel(f"{what} ({details})" if details else what)
            against_steps(ax, steps)
        scaled(axes[1].yaxis, np.concatenate([curves(method, "grad_norm").flatten() for method in methods]))
        title = "line: mean over seeds; band: lowest to highest" if several else None
        legend(figure, {line.get_label(): line for line in axes[0].lines}, title=title)


def draw_frontier(frontier: Frontier, output: Path, looks: Mapping[str, Look] = LOOKS) -> None:
    """Write frontier.png and frontier.svg: a curve per method over its learning rates, named where its rate is lowest.

    A curve is the mean over the seeds that have run at all rates; where there are several, each run is a light point.
    A dotted line marks the loss at which methods are compared.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    curves = {method: frontier.mean_curve(method) for method in frontier.curves}
    with picture(output / "frontier", 1, 1, size=(6.4, 4.2)) as (_, [ax]):
        for method, curve in curves.items():
            colour, style, marker = looks[method]
            runs = [point for of_seed in frontier.curves[method].values() for point in of_seed]
            if len(runs) > len(curve):
                ax.plot(
                    *_columns(runs), color=colour, marker=marker, linestyle="", markersize=4, alpha=0.3,
                    markeredgewidth=0,
                )  # fmt: skip
            ax.plot(
                *_columns(curve), color=colour, linestyle=style, linewidth=1.6, marker=marker, markersize=6,
                markerfacecolor="white", markeredgewidth=1.3,
            )  # fmt: skip
        common = fmean(frontier.losses.values())
        ax.axvline(common, color="0.45", linestyle=":", linewidth=1)
        ax.annotate(
            f"{common:.4g}", (common, 1), xycoords=("data", "axes fraction"), xytext=(3, -2),
            textcoords="offset points", va="top", fontsize=7, color="0.3",
        )  # fmt: skip
        positive = [point.drift for curve in curves.values() for point in curve if point.drift > 0]
        if positive and len(positive) == sum(map(len, curves.values())):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set(xlabel=f"{frontier.what} (nats per token)", ylabel="drift: KL(base || tuned) (nats per token)")
        ax.grid(alpha=0.25, linewidth=0.5, which="both")
        _name_curves(ax, curves, looks)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.loss for point in points], [point.drift for point in points]


def _name_curves(ax, curves: Mapping[str, Sequence[Point]], looks: Mapping[str, Look]) -> None:
    """Write each method's name at the right of the axes, as high as its curve begins, with a line to that point.

    Names that would touch are moved apart.
    """
    to_axes = ax.transAxes.inverted()
    ax.figure.canvas.draw()  # which settles where points are
    heights = {
        method: float(to_axes.transform(ax.transData.transform((curve[0].loss, curve[0].drift)))[1])
        for method, curve in curves.items()
    }
    for method, height in spaced(heights, 1 / _ROWS).items():
        begin, colour = curves[method][0], looks[method][0]
        ax.annotate(
            method, (begin.loss, begin.drift), xytext=(1.04, height), textcoords="axes fraction", color=colour,
            va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def spaced(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights that differ by a gap or more, in the same order, as few of them moved as the gap allows."""
    placed: dict[str, float] = {}
    top = -np.inf
    for name in sorted(heights, key=lambda name: heights[name]):
        top = placed[name] = max(heights[name], top + gap)
    over = max(0.0, top - 1.0)
    return {name: height - over for name, height in placed.items()}
