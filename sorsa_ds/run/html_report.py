"""report.html: a run to look at, with its settings, curves, evaluations and answers; finished or not."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from sorsa_ds.config.yaml_io import flat
from sorsa_ds.run.curves import draw_curves
from sorsa_ds.run.finished import FinishedRun, RunState
from sorsa_ds.run.metrics import read_metrics
from sorsa_ds.run.paths import ENDED, PAGE
from sorsa_ds.run.report_options import ReportOptions
from sorsa_ds.run.samples import read_samples
from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.files import write_text
from sorsa_ds.runtime.html_page import Told, figure, page, safe, table
from sorsa_ds.runtime.json_text import read_json

_PROMPTS, _ANSWERS = 50, 20
"""The most prompts that are shown, and answers to each: the first half of them and the last."""

_SHOWN = (
    "model", "method", "adapter.rank", "train.learning_rate", "train.schedule", "train.global_batch_size",
    "train.precision", "data.path", "data.max_length",
)  # fmt: skip
"""Settings that stand above the curves."""

_MEASURED = {
    "steps": "steps", "loss_first": "training loss, first tenth", "loss_last": "training loss, last tenth",
    "eval_loss_start": "held-out loss before", "eval_loss_end": "held-out loss after",
    "reg_loss_end": "L_reg at the end", "trainable_parameters": "trained numbers", "train_seconds": "seconds",
    "tokens_per_second": "tokens per second", "peak_memory_gib": "peak memory of a rank, GiB", "world_size": "ranks",
}  # fmt: skip
"""Figures of report.json -> their names."""


def report_on(options: ReportOptions) -> None:
    """Write the page of a run, and say where it is.

    Raises:
        ValueError: the folder is not a run's, a file in it is damaged, or the page cannot be written.
    """
    RunState(options.run).check_is_run("--run")
    say(f"Written: {write_page(options.run, options.output)}")


def write_page(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a run in whatever state it is; returns the page's path.

    Args:
        output: the page's file; None: report.html in the run's folder.

    Raises:
        ValueError: a file of the run is damaged, or the page cannot be written.
    """
    lines, samples = read_metrics(folder), read_samples(folder)
    has_steps = any("loss" in line for line in lines)
    parts = [
        f"<p>{safe(_state(folder))}</p>",
        table([], [[name, value] for name, value in _facts(folder).items()]),
        "<h2>Curves</h2>",
        figure(draw_curves(lines), "curves") if has_steps else "<p>No step is made yet.</p>",
        *_evaluations([line for line in lines if "eval_loss" in line]),
        *_answers(samples),
    ]
    target = folder / PAGE if output is None else output
    write_text(target, page(f"Run {folder.name}", parts), parents=output is not None)
    return target


def _state(folder: Path) -> str:
    """In which state the run is, in a sentence."""
    run, report = RunState(folder), _report(folder)
    if report:
        steps, planned = report.get("steps"), report.get("planned_steps")
        return f"Finished after {steps} steps" + (f" of {planned}: early." if planned not in (steps, None) else ".")
    if run.is_running:
        return "It trains now; this page shows how far it has come."
    ended = folder / ENDED
    told = read_json(ended) if ended.exists() else {}
    return f"It is unfinished. {told.get('why', '') if isinstance(told, dict) else ''}".strip()


def _report(folder: Path) -> dict:
    """What report.json holds; empty where the run is not finished."""
    return FinishedRun(folder).report() if RunState(folder).is_finished else {}


def _facts(folder: Path) -> dict[str, Any]:
    """Settings and figures, by name."""
    saved, report = flat(RunState(folder).saved_settings()), _report(folder)
    found: dict[str, Any] = {path: Told(saved[path]) for path in _SHOWN if saved.get(path) is not None}
    found |= {name: report[key] for key, name in _MEASURED.items() if report.get(key) is not None}
    if isinstance(best := report.get("best"), dict):
        kept = f", checkpoint {best['checkpoint']}" if best.get("checkpoint") else ""
        found["lowest held-out loss"] = f"{best.get('eval_loss')} after step {best.get('step')}{kept}"
    return found


def _evaluations(lines: list[dict]) -> list[str]:
    """The held-out losses as a table: over all data, and of each source where there are several."""
    if not lines:
        return []
    keys = list(dict.fromkeys(key for line in lines for key in line if key.startswith("eval_loss")))
    headings = ["step", *("held-out loss" if key == "eval_loss" else key.partition("/")[2] for key in keys)]
    rows = [[line["step"], *(line.get(key) for key in keys)] for line in lines]
    return ["<h2>Evaluations</h2>", table(headings, rows)]


def _answers(samples: list[dict]) -> list[str]:
    """What the model has answered to each held-out prompt, step by step."""
    if not samples:
        return []
    by_prompt: dict[tuple, list[dict]] = defaultdict(list)
    for sample in samples:
        by_prompt[sample.get("source"), sample.get("number"), sample["prompt"], sample["expected"]].append(sample)
    parts = ["<h2>Answers to held-out prompts</h2>"]
    if len(by_prompt) > _PROMPTS:
        parts.append(f'<p class="note">The first {_PROMPTS} of {len(by_prompt)} prompts; samples.jsonl has all.</p>')
    for place, ((*_, prompt, expected), given) in enumerate(list(by_prompt.items())[:_PROMPTS], start=1):
        rows = [[one["step"], Told(one["answer"])] for one in _ends(given)]
        left_out = len(given) - len(rows)
        parts += [
            f'<h3>Prompt {place}</h3><p class="told">{safe(prompt)}</p>',
            table(["step", "answer"], [["expected", Told(expected)], *rows]),
            *([f'<p class="note">{left_out} answers between are left out.</p>'] if left_out else []),
        ]
    return parts


def _ends(given: list[dict]) -> list[dict]:
    half = _ANSWERS // 2
    return given if len(given) <= _ANSWERS else [*given[:half], *given[-half:]]
