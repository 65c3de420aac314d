"""Loss and gradient norm against steps, as in Figure 4 of the papers: one colour per method, its seeds as a band."""

from itertools import cycle
from pathlib import Path

import numpy as np

from sorsa_ds.run.metrics import read_metrics
from sorsa_ds.runtime import plotting
from sorsa_ds.runtime.plotting import against_steps, legend, picture, scaled, smoothed
from sorsa_ds.study.compare.results import MethodResult
from sorsa_ds.study.compare.trials import METHODS

LOOKS = dict(zip(METHODS, cycle(plotting.LOOKS), strict=False))
"""Colour and line style of each method, the same in every picture."""


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
                colour, style = LOOKS[method.method]
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
