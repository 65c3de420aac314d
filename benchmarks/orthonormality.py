"""What the regulariser does to the default run: orthonormality of U and V, and the losses, for several gamma.

    python benchmarks/orthonormality.py --epochs 3 --gammas 0 0.2*lr

Trains the default model once for each gamma through the real launcher, then draws one figure, writes a table, and
prints one JSON object as its last line.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from sorsa_ds.run_folder import read_metrics

ROOT = Path(__file__).parents[1]
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def main() -> None:
    """Train, draw, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gammas", nargs="+", default=["0", "0.2*lr"])
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ds_config", default="ds_configs/zero2.json")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("settings", nargs="*", help="dotted overrides for every run")
    arguments = parser.parse_args()

    runs = {gamma: train(gamma, arguments) for gamma in arguments.gammas}
    draw(runs, arguments.output / "orthonormality.png")
    rows = {gamma: summary(folder) for gamma, folder in runs.items()}
    write_table(rows, arguments, arguments.output / "orthonormality.md")
    print(json.dumps({"reg_loss_end": {gamma: row["reg_loss_end"] for gamma, row in rows.items()}}))


def train(gamma: str, arguments: argparse.Namespace) -> Path:
    """One run of the default model; its folder."""
    name = f"orthonormality-{gamma.replace('*', 'x')}-{time.strftime('%H%M%S')}"
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(arguments.ranks), "launch/train.py",
        "--ds_config", arguments.ds_config, f"regularizer.gamma={gamma}", f"train.epochs={arguments.epochs}",
        f"output.name={name}", *arguments.settings,
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    return ROOT / "runs" / name


def summary(folder: Path) -> dict:
    """The figures of one run's report."""
    return json.loads((folder / "report.json").read_text())


def draw(runs: dict[str, Path], path: Path) -> None:
    """Regulariser, training loss and gradient norm against steps, a line a gamma."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    columns = (("reg_loss", "L_reg (mean over matrices)"), ("loss", "training loss (nats per token)"),
               ("grad_norm", "gradient norm"))  # fmt: skip
    for (gamma, folder), colour in zip(runs.items(), COLOURS, strict=False):
        lines = [line for line in read_metrics(folder) if "loss" in line]
        for ax, (key, label) in zip(axes, columns, strict=True):
            ax.plot([x["step"] for x in lines], [x[key] for x in lines], color=colour, label=f"gamma = {gamma}")
            ax.set(xlabel="step", ylabel=label)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def write_table(rows: dict[str, dict], arguments: argparse.Namespace, path: Path) -> None:
    """The Markdown page with the command, the versions and the figures."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    command = f"python benchmarks/orthonormality.py --epochs {arguments.epochs:g} --gammas {' '.join(arguments.gammas)}"
    lines = [
        "# The regulariser on the default run",
        "",
        "![orthonormality, loss and gradient norm against steps](orthonormality.png)",
        "",
        f"`{' '.join([command, *arguments.settings])}`, {time.strftime('%Y-%m-%d')}, {arguments.ranks} ranks on "
        f"{platform.machine()}, {versions}. One seed.",
        "",
        "| gamma | L_reg at the end | training loss, last tenth | held-out loss at the end |",
        "|---|---|---|---|",
    ]
    for gamma, row in rows.items():
        lines.append(f"| {gamma} | {row['reg_loss_end']:.3g} | {row['loss_last']:.4f} | {row['eval_loss_end']:.4f} |")
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
