"""Pictures for print, as PNG and SVG, in colours that colour-blind readers can tell apart."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sorsa_ds.runtime.files import write_atomic

# The colours are those of Okabe and Ito. Together with the line styles they can be told apart in grey too.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C", "#7A5195", "#6B4C2A")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)),
          (0, (1, 3)))  # fmt: skip
LOOKS = tuple(zip(COLOURS, STYLES, strict=True))

_MOST_MARKERS = 25
_ROUNDING = 1e-12
"""Values below this one are taken for rounding errors, and set no limit of an axis."""
_WIDE = 20
"""An axis is logarithmic where its largest value is more than so many times the smallest."""
_FONT_SIZE = 9
_SETTINGS: dict[Any, Any] = {
    "font.size": _FONT_SIZE,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def picture(path: Path, rows: int, columns: int, size: tuple[float, float], **subplots) -> Iterator[tuple]:
    """A context that gives (figure, list of its axes) and writes the figure as `path`.png and `path`.svg at the end.

    Args:
        size: width and height in inches.
        subplots: further arguments of matplotlib's `subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_SETTINGS):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **subplots)
        try:
            yield figure, list(axes.flat)
            for suffix in ("png", "svg"):
                write_atomic(path.with_name(f"{path.name}.{suffix}"), partial(figure.savefig, dpi=160, format=suffix))
        finally:
            plt.close(figure)


def plain(text: str) -> str:
    """Escape a text from outside, such as a run's name, so that matplotlib does not read it as mathematics."""
    return text.replace("$", r"\$")


def legend(figure, handles: dict, **settings) -> None:
    """Draw a legend under all axes, with as many columns as fit.

    Args:
        handles: label -> artist. A label may begin with `_`.
        settings: further arguments of matplotlib's `legend`.
    """
    widest = max(map(len, handles)) + 8  # in characters, each half as wide as the font's size; 8 for the handle
    columns = int(figure.get_figwidth() * 72 / (0.5 * _FONT_SIZE) / widest)
    figure.legend(
        [*handles.values()], [*handles], loc="outside lower center", ncols=max(1, min(4, columns, len(handles))),
        frameon=False, handlelength=3.5, **settings,
    )  # fmt: skip


def sparse(count: int) -> int:
    """The distance between the markers to draw of `count` points, so that at most 25 markers are drawn."""
    return max(1, -(-count // _MOST_MARKERS))


def against_steps(ax, last: int) -> None:
    """Label and scale axes whose horizontal axis counts optimizer steps from 0 to `last`."""
    from matplotlib.ticker import MaxNLocator

    ax.set(xlabel="step", xlim=(-0.02 * last, 1.02 * last))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.25, linewidth=0.5)


def scaled(axis, values: Iterable[float]) -> None:
    """Make an axis logarithmic where its positive values span a wide range, and let those values set its limits."""
    positive = [value for value in values if _ROUNDING < value < float("inf")]
    if positive and max(positive) > _WIDE * min(positive):
        side = "x" if axis.axis_name == "x" else "y"
        axis.axes.set(**{f"{side}scale": "log"})
        low, high = min(positive), max(positive)
        axis.axes.set(**{f"{side}lim": (low * (low / high) ** 0.05, high * (high / low) ** 0.05)})


def apart(axis) -> None:
    """Draw few enough numbers on an axis that they do not touch in a narrow panel."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(numticks=5))
        axis.set_minor_locator(
            LogLocator(subs=(3,))
        )  # matplotlib labels them where the axis shows only one power of ten
    else:
        axis.set_major_locator(MaxNLocator(4))


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The running mean over the last `window` steps, or over all steps so far at the beginning; (series, steps)."""
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    ends = np.arange(1, values.shape[1] + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[:, ends] - sums[:, starts]) / (ends - starts)
