"""The curves of a run as a picture: loss and held-out loss, the regulariser, the learning rate, the speed."""

import io
from collections.abc import Sequence
from typing import Any

from sorsa_ds.runtime.plotting import COLOURS, against_steps, scaled

_SPEED = "tokens_per_second"


def draw_curves(lines: Sequence[dict]) -> bytes:
    """A PNG of the curves in the lines of metrics.jsonl, of which one or more are of a step."""
    from matplotlib.figure import Figure

    train, held_out = ([line for line in lines if _is_number(line, key)] for key in ("loss", "eval_loss"))
    last = max(line["step"] for line in lines)
    drawn = Figure(figsize=(11, 6), layout="constrained")
    for axes, title, key in zip(
        drawn.subplots(2, 2).flat,
        ("loss (nats per token)", _second(train)[1], "learning rate", "tokens per second"),
        ("loss", _second(train)[0], "learning_rate", _SPEED),
        strict=True,
    ):
        _line(axes, train, key, "training")
        if key == "loss":
            steps, losses = [line["step"] for line in held_out], [line["eval_loss"] for line in held_out]
            axes.plot(steps, losses, "o--", label="held-out", color=COLOURS[0], markersize=3)
            axes.legend(frameon=False)
        elif key == _second(train)[0]:
            scaled(axes.yaxis, (line[key] for line in train if _is_number(line, key)))
        against_steps(axes, max(1, last))
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    drawn.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def _second(train: Sequence[dict]) -> tuple[str, str]:
    """What is drawn beside the loss: the regulariser where there is one, else the gradient's norm."""
    has = any("reg_loss" in line for line in train)
    return ("reg_loss", "regulariser L_reg") if has else ("grad_norm", "gradient norm")


def _is_number(line: dict, key: str) -> bool:
    return isinstance(line.get(key), int | float)


def _line(axes: Any, lines: Sequence[dict], key: str, label: str) -> None:
    found = [line for line in lines if _is_number(line, key)]
    axes.plot([line["step"] for line in found], [line[key] for line in found], label=label, color=COLOURS[1], lw=1)
