"""Loss and gradient norm against steps, a colour a method, its seeds as a band: Figure 4 of the papers."""

from pathlib import Path

import numpy as np

from sorsa_ds.compare.results import MethodResult
from sorsa_ds.compare.trials import METHODS
from sorsa_ds.files import write_atomic
from sorsa_ds.run_folder import read_metrics

# Okabe and Ito's colours, which colour-blind readers tell apart; with the line styles they are told apart in grey too.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C", "#7A5195")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
LOOKS = dict(zip(METHODS, zip(_COLOURS, _STYLES, strict=True), strict=True))
"""Colour and line style of each method, the same in every picture."""


def curves(method: MethodResult, key: str) -> np.ndarray:
    """A column of the runs' metrics, (seeds, steps); steps that not every run has are left out."""
    columns = [[line[key] for line in read_metrics(run.folder) if "loss" in line] for run in method.runs]
    return np.array([column[: min(map(len, columns))] for column in columns])


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` steps, (seeds, steps); over fewer at the beginning."""
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    ends = np.arange(1, values.shape[1] + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[:, ends] - sums[:, starts]) / (ends - starts)


def draw(methods: list[MethodResult], output: Path) -> None:
    """Write comparison.png and comparison.svg; nothing where no run is finished."""
    if not methods:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    steps = min(curves(method, "loss").shape[1] for method in methods)
    window = max(1, steps // 25)
    mean = [f"mean of {window} steps"] if window > 1 else []
    several = any(len(method.runs) > 1 for method in methods)
    with plt.rc_context({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.9), layout="constrained")
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
            ax.set(xlabel="step", ylabel=f"{what} ({details})" if details else what, xlim=(1, max(steps, 2)))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.grid(alpha=0.25, linewidth=0.5)
        axes[1].set_yscale("log")
        handles, labels = axes[0].get_legend_handles_labels()
        title = "line: mean over seeds; band: lowest to highest" if several else None
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, title=title
        )
        for suffix in ("png", "svg"):
            write_atomic(
                output / f"comparison.{suffix}",
                lambda path, suffix=suffix: figure.savefig(path, dpi=160, format=suffix),
            )
        plt.close(figure)
