"""Pictures for print: colours that colour-blind readers tell apart, PNG and SVG, written whole."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from sorsa_ds.runtime.files import write_atomic

# Okabe and Ito's colours; with the line styles they are told apart in grey too.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C", "#7A5195")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
LOOKS = tuple(zip(COLOURS, STYLES, strict=True))

_MOST_MARKERS = 25
_ROUNDING = 1e-12
"""What is smaller is rounding, and sets no axis."""
_WIDE = 20
"""From this ratio of largest to smallest on, a linear axis would show the small ones as nothing."""
_SETTINGS = {"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}


@contextmanager
def picture(path: Path, rows: int, columns: int, size: tuple[float, float], **subplots) -> Iterator[tuple]:
    """Context with (figure, its axes in a list), written as `path`.png and `path`.svg at the end.

    Args:
        size: inches. subplots: further arguments of matplotlib's.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_SETTINGS):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **subplots)
        try:
            yield figure, list(axes.flat)
            for suffix in ("png", "svg"):
                write_atomic(
                    path.with_name(f"{path.name}.{suffix}"),
                    lambda temporary, suffix=suffix: figure.savefig(temporary, dpi=160, format=suffix),
                )
        finally:
            plt.close(figure)


def plain(text: str) -> str:
    """A text from outside, as a run's name, in which matplotlib reads no mathematics."""
    return text.replace("$", r"\$")


def legend(figure, handles: dict, **settings) -> None:
    """A legend under all axes, of as many columns as fit. handles: label -> artist; a label may begin with `_`."""
    widest = max(map(len, handles)) + 8  # with the handle, in characters of half the font's size
    columns = int(figure.get_figwidth() * 72 / (0.5 * _SETTINGS["font.size"]) / widest)
    figure.legend(
        [*handles.values()], [*handles], loc="outside lower center", ncols=max(1, min(4, columns, len(handles))),
        frameon=False, handlelength=3.5, **settings,
    )  # fmt: skip


def sparse(count: int) -> int:
    """Which marker of `count` is drawn, every so many, for them to lie apart."""
    return max(1, -(-count // _MOST_MARKERS))


def against_steps(ax, last: int) -> None:
    """Dress the axes of something that is shown against optimizer steps."""
    from matplotlib.ticker import MaxNLocator

    ax.set(xlabel="step", xlim=(-0.02 * last, 1.02 * last))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.25, linewidth=0.5)


def scaled(axis, values: Iterable[float]) -> None:
    """Make an axis logarithmic where its positive values span much; they, not what is far below, set its lower end."""
    positive = [value for value in values if _ROUNDING < value < float("inf")]
    if positive and max(positive) > _WIDE * min(positive):
        side = "x" if axis.axis_name == "x" else "y"
        axis.axes.set(**{f"{side}scale": "log"})
        low, high = min(positive), max(positive)
        axis.axes.set(**{f"{side}lim": (low * (low / high) ** 0.05, high * (high / low) ** 0.05)})


def apart(axis) -> None:
    """Leave out numbers on an axis that would touch in a narrow panel."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(numticks=5))
        axis.set_minor_locator(LogLocator(subs=(3,)))  # they get numbers where there is one power of ten
    else:
        axis.set_major_locator(MaxNLocator(4))


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` steps, (series, steps); over fewer at the beginning."""
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    ends = np.arange(1, values.shape[1] + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[:, ends] - sums[:, starts]) / (ends - starts)
