"""What form and strength of the regulariser do to a run: orthonormality of U and V, training loss, held-out loss.

    python benchmarks/regularizer_study.py --output studies/regularizer        the default model
    python benchmarks/regularizer_study.py --output studies/tiny --learning_rates 4e-4 --strengths 0.2,20 \
        --no_presets train.steps=8

For each learning rate there is a run without a regulariser, one in which U and V are made orthonormal after every step
instead, one with each of the presets `reference` and `paper`, and one with either form at each strength c. That is
gamma / eta_d for the mean over the matrices; the presets are converted to the same scale. All runs use the real
launcher. The same command goes on where it was stopped, and a command with other settings adds to what is there. Writes
study.csv, study.md, study.png and study.svg; the last line is one JSON object.
"""

import argparse
import csv
import io
import json
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.helpers.common import DS_CONFIGS, launch_environment, train_command
from sorsa_ds.config import command_line
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.model import adapter_file
from sorsa_ds.runtime import plotting
from sorsa_ds.runtime.files import write_text
from sorsa_ds.sorsa.regularizer import resolve_regularizer
from sorsa_ds.study.analysis import measures

STRENGTHS = [0.002, 0.02, 0.2, 2.0, 20.0, 200.0, 2000.0]
FORMS = ("norm", "squared")
PRESETS = {"reference": "^", "paper": "s"}
"""Presets, and their markers in the picture."""
COLUMNS = {
    "c": ("c", ".4g"),
    "orthonormality": ("mean ‖XᵀX − I‖ of U and V", ".2e"),
    "loss_last": ("training loss, last tenth", ".4f"),
    "eval_loss_end": ("held-out loss", ".4f"),
}
"""Heading and format of each figure of a run."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One setting of the regulariser.

    kind: `norm`, `squared`, `none`, `reorthonormalize`, `reference` or `paper`. strength: c, for `norm` and `squared`.
    """

    kind: str
    learning_rate: float
    strength: float | None = None

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        strength = "" if self.strength is None else f"-{self.strength:g}"
        return f"{self.kind}{strength}-lr{self.learning_rate:g}"

    def settings(self) -> list[str]:
        """The run's settings on the command line."""
        regularizer = {
            "none": ["gamma=0"],
            "reorthonormalize": ["gamma=0", "reorthonormalize=1"],
            "reference": ["preset=reference"],
            "paper": ["preset=paper"],
        }.get(self.kind) or [f"form={self.kind}", f"gamma={self.strength}*lr"]
        return [f"train.learning_rate={self.learning_rate}", *(f"regularizer.{setting}" for setting in regularizer)]


def numbers(text: str) -> list[float]:
    """The numbers of a list like `1e-4,4e-4`."""
    return [float(word) for word in text.split(",")]


def choices(a: argparse.Namespace) -> Iterator[Choice]:
    """All runs of the study that the command asks for."""
    for rate in a.learning_rates:
        for kind in ("none", "reorthonormalize", *([] if a.no_presets else PRESETS)):
            yield Choice(kind, rate)
        for strength in a.strengths:
            for form in FORMS:
                yield Choice(form, rate, strength)


def main() -> None:
    """Train, tabulate and draw after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--learning_rates", type=numbers, default=[1.3e-4, 4e-4], help="as in 1e-4,4e-4")
    parser.add_argument("--strengths", type=numbers, default=STRENGTHS, help="c of both forms, as in 0.2,20")
    parser.add_argument("--no_presets", action="store_true", help="leave out the presets reference and paper")
    parser.add_argument("--num_gpus", type=int, default=1, help="ranks")
    parser.add_argument("--ds_config", default=str(DS_CONFIGS / "zero2.json"))
    parser.add_argument("settings", nargs="*", help="settings for all runs, as train.steps=32")
    a = parser.parse_args()
    rows = read(a.output)
    for choice in choices(a):
        rows[choice] = train(choice, a)
        print(choice.name, rows[choice], flush=True)
        write(rows, a.output)
    print(json.dumps({choice.name: row for choice, row in rows.items()}))


def train(choice: Choice, a: argparse.Namespace) -> dict[str, float]:
    """The figures of one run, which is trained unless its report is there."""
    folder = a.output.resolve() / "runs" / choice.name
    if not (folder / "report.json").exists():
        command = train_command(
            a.num_gpus, a.ds_config, "--resume", "auto", f"output.folder={folder.parent}", f"output.name={choice.name}",
            "output.save_every=0", *choice.settings(), *a.settings,
        )  # fmt: skip
        subprocess.run(command, env=launch_environment(), check=True, stdout=subprocess.DEVNULL)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    described = adapter_file.read_description(folder / "adapter")
    return {
        "c": on_the_mean(folder, 2 * len(described.layers)),
        "orthonormality": orthonormality(folder / "adapter", described),
        **{key: report[key] for key in ("loss_last", "eval_loss_end")},
    }


def on_the_mean(folder: Path, matrices: int) -> float:
    """gamma / eta_d of a run, converted to the mean over its matrices; 0 where there is no regulariser."""
    config = command_line.load_settings(RunConfig, folder / "config.yaml")
    accumulation = json.loads((folder / "ds_config.json").read_text(encoding="utf-8"))["gradient_accumulation_steps"]
    found = resolve_regularizer(
        config.regularizer, learning_rate=config.train.learning_rate, accumulation_steps=accumulation
    )
    return found.coefficient * (matrices if found.reduction == "sum" else 1)


def orthonormality(folder: Path, described: adapter_file.Description) -> float:
    """Mean of ||X^T X - I||_F over the trained U and V of an adapter, in float64, whatever form it was trained with."""
    tensor = adapter_file.open_factors(folder, adapter_file.TRAINED, described).tensor
    names = [f"{layer}.{factor}" for layer in described.layers for factor in ("U", "V")]
    return statistics.fmean(measures.orthonormality(tensor(name).double()) for name in names)


def read(output: Path) -> dict[Choice, dict[str, float]]:
    """The figures of runs that earlier commands have written into the folder of the study."""
    rows = {}
    if (output / "study.csv").exists():
        with (output / "study.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                strength = float(row["strength"]) if row["strength"] else None
                choice = Choice(row["kind"], float(row["learning_rate"]), strength)
                rows[choice] = {key: float(row[key]) for key in COLUMNS}
    return rows


def write(rows: dict[Choice, dict[str, float]], output: Path) -> None:
    """Write the tables and the picture of all runs so far."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*Choice.__dataclass_fields__, *COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(choice), **row} for choice, row in rows.items())
    write_text(output / "study.csv", text.getvalue())
    lines = [f"| regulariser | learning rate | {' | '.join(heading for heading, _ in COLUMNS.values())} |"]
    lines += ["|" + "---|" * (2 + len(COLUMNS))]
    for choice, row in rows.items():
        figures = " | ".join(f"{row[key]:{form}}" for key, (_, form) in COLUMNS.items())
        lines.append(f"| {choice.kind} | {choice.learning_rate:g} | {figures} |")
    write_text(output / "study.md", "\n".join(lines) + "\n")
    draw(rows, output)


def draw(rows: dict[Choice, dict[str, float]], output: Path) -> None:
    """Draw each figure against the strength, with a row of panels per learning rate.

    A run without a strength is a horizontal line.
    """
    rates = sorted({choice.learning_rate for choice in rows})
    kinds = (*FORMS, "none", "reorthonormalize", "reference", "paper")
    shown = [key for key in COLUMNS if key != "c"]
    with plotting.picture(output / "study", len(rates), 3, size=(10, 2.6 * len(rates) + 0.6)) as (figure, axes):
        for i, rate in enumerate(rates):
            for ax, key in zip(axes[3 * i : 3 * i + 3], shown, strict=True):
                for kind, (colour, style) in zip(kinds, plotting.LOOKS, strict=False):
                    points = sorted(
                        (row["c"], row[key]) for c, row in rows.items() if (c.learning_rate, c.kind) == (rate, kind)
                    )
                    if kind in FORMS and points:
                        ax.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker="o", ms=3, label=kind)
                    elif kind in PRESETS and points:
                        ax.plot(*points[0], color=colour, linestyle="", marker=PRESETS[kind], ms=7, label=kind)
                    elif points:
                        ax.axhline(points[0][1], color=colour, linestyle=style, linewidth=1.2, label=kind)
                ax.set(xscale="log", xlabel="c = gamma / eta_d on the mean", ylabel=COLUMNS[key][0])
                ax.set_title(f"learning rate {rate:g}", fontsize=9)
                plotting.scaled(ax.yaxis, [row[key] for c, row in rows.items() if c.learning_rate == rate])
                ax.grid(alpha=0.25, linewidth=0.5)
        handles, labels = axes[0].get_legend_handles_labels()
        plotting.legend(figure, dict(zip(labels, handles, strict=True)))


if __name__ == "__main__":
    main()
