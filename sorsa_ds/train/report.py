"""The end of a run: what report.json holds, a short table on the console, a picture of the loss in the run folder."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.data.counts import Counts, Taken, total
from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.model.adapter_file import TRAINED
from sorsa_ds.model.peft_names import WEIGHTS
from sorsa_ds.run.checkpoint.folder import best_checkpoint, step_of
from sorsa_ds.run.checkpoint.keeper import PACKAGES
from sorsa_ds.run.checkpoint.manifest import RunProgress
from sorsa_ds.run.html_report import write_page
from sorsa_ds.run.metrics import read_metrics
from sorsa_ds.run.paths import ADAPTER, CHECKPOINTS, PAGE, PICTURE
from sorsa_ds.run.ways_on import evaluating
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import note, say, table
from sorsa_ds.runtime.files import write_atomic
from sorsa_ds.runtime.process import memory_gib, peak_memory_gib
from sorsa_ds.runtime.versions import package_versions
from sorsa_ds.runtime.words import typed


def build_report(
    *,
    config: RunConfig,
    engine: SorsaEngine,
    progress: RunProgress,
    planned: int,
    losses: list[float],
    eval_loss: float | None,
    eval_losses: dict[str, float],
    sources: dict[str, Taken],
    held_out: dict[str, Counts],
    folder: Path,
) -> dict:
    """What report.json will hold. A collective call.

    Args:
        planned: the steps that the run was to have; it may have stopped earlier.
        losses: the training loss of every step of the run.
        eval_loss: the loss on held-out data after the last step; None without such data.
        eval_losses: the loss on the held-out data of each source after the last step, where there are several.
        sources: what became of the rows of each source, and how many of its examples the run has taken.
        held_out: what became of the held-out rows of each source that has any.
        folder: the run's.
    """
    tenth = max(1, len(losses) // 10)
    return {
        "steps": progress.step,
        "planned_steps": planned,
        "loss_first": sum(losses[:tenth]) / tenth,
        "loss_last": sum(losses[-tenth:]) / tenth,
        "base_loss": progress.base_loss,
        "start_loss": progress.start_loss,
        "eval_loss_start": progress.eval_loss_start,
        "eval_loss_end": eval_loss,
        "best": _best(progress, folder),
        "sources": {
            name: {
                **one.counts.as_dict(),
                "taken": one.examples,
                "held_out": held_out[name].as_dict() if name in held_out else None,
                "eval_loss_start": progress.eval_losses_start.get(name),
                "eval_loss_end": eval_losses.get(name),
            }
            for name, one in sources.items()
        },
        "reg_loss_end": progress.reg_loss,
        "method": config.method,
        "regularizer": engine.regularizer and asdict(engine.regularizer),
        "trainable_parameters": engine.trained_numbers,
        "train_seconds": progress.seconds,  # evaluations and saves included
        "tokens_per_second": progress.tokens / progress.seconds,
        "memory_gib": memory_gib(),
        "peak_memory_gib": max(collectives.gather_lists([peak_memory_gib()])),
        "data": {
            "training": total([one.counts for one in sources.values()]).as_dict(),
            "held-out": total(list(held_out.values())).as_dict(),
        },
        "world_size": collectives.world_size(),
        "versions": package_versions(PACKAGES),
    }


def _best(progress: RunProgress, folder: Path) -> dict | None:
    """The evaluation with the lowest loss after the first step, and its checkpoint if that is kept."""
    best, kept = progress.best, best_checkpoint(folder)
    if best.loss is None:
        return None
    found = kept is not None and step_of(kept) == best.step
    return {"step": best.step, "eval_loss": best.loss, "checkpoint": kept.name if kept and found else None}


def show_report(report: dict, folder: Path) -> None:
    """Print the report, draw the loss and write the page to look at, on rank 0."""
    if collectives.rank() != 0:
        return
    for show, name in ((draw_loss, PICTURE), (write_page, PAGE)):
        try:
            show(folder)
        except Exception as error:  # the run is finished; a full disk or a damaged file must not fail it
            note(f"{folder / name} is not written: {error}")
    rows = [
        (
            "steps",
            f"{_told_steps(report)} in {report['train_seconds']:.0f} s, {report['tokens_per_second']:.0f} tokens/s",
        ),
        ("training loss", f"{report['loss_first']:.4f} -> {report['loss_last']:.4f}  (first and last tenth)"),
    ]
    rows += [(f"{kind} rows", _told(counts)) for kind, counts in report["data"].items() if counts["rows"]]
    if report["eval_loss_end"] is not None:
        rows.append(("held-out loss", f"{report['eval_loss_start']:.4f} -> {report['eval_loss_end']:.4f}"))
    if (best := report["best"]) is not None and best["step"] < report["steps"]:
        kept = f"kept in {folder / CHECKPOINTS / best['checkpoint']}" if best["checkpoint"] else "no checkpoint of it"
        rows.append(("best", f"{best['eval_loss']:.4f} after step {best['step']}, {kept}"))
    rows += [(name, _told_source(one)) for name, one in report["sources"].items() if len(report["sources"]) > 1]
    if report["reg_loss_end"] is not None:
        rows.append(("orthonormality", f"L_reg = {report['reg_loss_end']:.3g}"))
    rows += [
        ("memory", f"{report['memory_gib']:.2f} GiB on rank 0"),
        ("adapter", _sized(folder / ADAPTER / TRAINED)),
        *(("for PEFT", _sized(file)) for file in [folder / ADAPTER / WEIGHTS] if file.exists()),
        *(("look at it", typed(file)) for file in [folder / PAGE] if file.exists()),
        ("evaluate it", evaluating(folder)),
    ]
    say("\n" + table(rows))


def _sized(file: Path) -> str:
    """A file as it can be typed, and its size."""
    return f"{typed(file)} ({file.stat().st_size / 2**20:.1f} MiB)"


def _told_steps(report: dict) -> str:
    early = report["steps"] < report["planned_steps"]
    return f"{report['steps']} of {report['planned_steps']}, stopped early," if early else str(report["steps"])


def _told(counts: dict) -> str:
    """What became of rows, in words."""
    told = [f"{counts['learned_rows']:,} of {counts['rows']:,} taken"]
    told += [f"{counts['cut']:,} cut"] * bool(counts["cut"])
    return ", ".join([*told, *(f"{rows:,} left out: {reason}" for reason, rows in counts["left_out"].items())])


def _told_source(source: dict[str, Any]) -> str:
    """What a run took of one of several sources, in a line."""
    told = f"{source['taken']:,} times an example of {source['learned_rows']:,}"
    if source["eval_loss_end"] is None:
        return told
    return f"{told}; held-out loss {source['eval_loss_start']:.4f} -> {source['eval_loss_end']:.4f}"


def draw_loss(folder: Path) -> None:
    """Write loss.png: training and held-out loss, and the regulariser (else the gradient norm), against steps."""
    from matplotlib.figure import Figure

    lines = read_metrics(folder)
    train = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([x["step"] for x in train], [x["loss"] for x in train], label="training", color="#0072B2")
    if held_out:
        steps, losses = [x["step"] for x in held_out], [x["eval_loss"] for x in held_out]
        left.plot(steps, losses, "o--", label="held-out", color="#D55E00")
    left.set(xlabel="step", ylabel="loss (nats per token)")
    left.legend(frameon=False)
    key, label = ("reg_loss", "regulariser L_reg") if "reg_loss" in train[0] else ("grad_norm", "gradient norm")
    right.plot([x["step"] for x in train], [x[key] for x in train], color="#009E73")
    right.set(xlabel="step", ylabel=label)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    write_atomic(folder / PICTURE, lambda temporary: figure.savefig(temporary, dpi=120, format="png"), parents=False)
