"""The figures of a comparison: comparison.md for people, comparison.csv and comparison.json for programs."""

import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sorsa_ds.config.mixing import sources_of
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.methods.settings import listed
from sorsa_ds.runtime.files import write_json, write_text
from sorsa_ds.study.compare.frontier import Frontier
from sorsa_ds.study.compare.results import MethodResult, Result, Spread
from sorsa_ds.study.compare.score import Evaluation
from sorsa_ds.study.compare.trials import Trial

COLUMNS = {
    "loss_last": ("training loss, last tenth", ".4f"),
    "eval_loss_start": ("held-out loss before", ".4f"),
    "eval_loss_end": ("held-out loss after", ".4f"),
    "train_seconds": ("seconds", ".0f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "peak_memory_gib": ("peak memory per rank, GiB", ".2f"),
    "trainable_parameters": ("trained parameters", ",.0f"),
}
"""Name of a figure in a run's report -> its heading and format."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that the tables are made from.

    settings: shared by all runs. evaluation: the task in which models were measured. before: the base model's score.
    methods: each at its best learning rate. runs: all that are finished. failed: trial -> why it failed. left_out:
    method -> the settings that it has no use for. seed: the one with which learning rates were tried. frontier: what
    the drift of the runs shows; None where it was not measured.
    """

    settings: RunConfig
    evaluation: Evaluation | None
    before: float | None
    methods: list[MethodResult]
    runs: list[Result]
    failed: dict[Trial, str]
    left_out: dict[str, dict[str, object]]
    seed: int
    frontier: Frontier | None = None


def write_tables(comparison: Comparison, output: Path) -> None:
    """Write comparison.md, comparison.csv and comparison.json."""
    write_text(output / "comparison.md", markdown(comparison))
    write_text(output / "comparison.csv", as_csv(comparison))
    write_json(output / "comparison.json", as_json(comparison))


def markdown(comparison: Comparison) -> str:
    """The report in Markdown: the methods' figures, the learning rates that were tried, and what went wrong."""
    lines = ["# Comparison", "", *_setup(comparison), ""]
    headings = ["method", "learning rate", "seeds"]
    headings += [heading for heading, _ in COLUMNS.values()]
    if comparison.evaluation:
        headings += [f"{comparison.evaluation.heading} {when}" for when in ("before", "after")]
    rows = []
    for one in comparison.methods:
        row = [one.method, f"{one.learning_rate:g}", ", ".join(str(run.trial.seed) for run in one.runs)]
        row += [_text(one.spread(key), form) for key, (_, form) in COLUMNS.items()]
        if comparison.evaluation:
            form = comparison.evaluation.form
            row += [_text(Spread.of([comparison.before]), form), _text(one.score, form)]
        rows.append(row)
    lines += [*_table(headings, rows), "", "![loss and gradient norm against steps](comparison.png)", ""]
    tried = [run for run in comparison.runs if run.trial.seed == comparison.seed]
    if len({(run.trial.method, run.trial.learning_rate) for run in tried}) > len(comparison.methods):
        rates = sorted({run.trial.learning_rate for run in tried})
        found = {(run.trial.method, run.trial.learning_rate): f"{run.criterion:.4f}" for run in tried}
        lines += [
            f"Learning rates were tried with seed {comparison.seed}; each method goes on with the one whose held-out "
            f"loss (training loss, where nothing is held out) is lowest:",
            "",
            *_table(
                ["method", *(f"{rate:g}" for rate in rates)],
                [[m.method, *(found.get((m.method, rate), "") for rate in rates)] for m in comparison.methods],
            ),
            "",
        ]
    if comparison.frontier:
        lines += [*_frontier_lines(comparison.frontier), ""]
    for method, settings in comparison.left_out.items():
        lines += [f"- {method} has no use for {listed(settings)}, and ran without."]
    for trial, reason in comparison.failed.items():
        lines += [f"- {trial.name} failed: {reason}"]
    return "\n".join(lines).rstrip() + "\n"


def as_csv(comparison: Comparison) -> str:
    """A CSV table with one row per method: each figure's mean and deviation over seeds, and the number of seeds."""
    text = io.StringIO()
    headings = ["method", "learning_rate", "seeds"]
    headings += [f"{key}{end}" for key in (*COLUMNS, "score") for end in ("", "_deviation")]
    if comparison.frontier:
        headings += ["equal_loss", "drift_at_equal_loss", "drift_at_equal_loss_deviation", "drift_at_equal_loss_seeds"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    for one in comparison.methods:
        spreads = [*(one.spread(key) for key in COLUMNS), one.score]
        numbers = [number for s in spreads for number in ((s.mean, s.deviation) if s else (None, None))]
        if comparison.frontier:
            numbers += _equal_cells(comparison.frontier, one.method)
        writer.writerow([one.method, one.learning_rate, len(one.runs), *numbers])
    return text.getvalue()


def as_json(comparison: Comparison) -> dict:
    """Everything as JSON: the settings, the figures by method, and every run with its whole report."""
    return {
        "settings": asdict(comparison.settings),
        "rates_tried_with_seed": comparison.seed,
        "task": comparison.evaluation and comparison.evaluation.task,
        "score": comparison.evaluation and comparison.evaluation.score,
        "score_before": comparison.before,
        "methods": [
            {
                "method": one.method,
                "learning_rate": one.learning_rate,
                "seeds": [run.trial.seed for run in one.runs],
                "figures": {key: _dict(one.spread(key)) for key in COLUMNS},
                "score": _dict(one.score),
            }
            for one in comparison.methods
        ],
        "runs": [
            {**asdict(run.trial), "folder": str(run.folder), "report": run.report, "score": run.score}
            for run in comparison.runs
        ],
        "frontier": comparison.frontier and _frontier_dict(comparison.frontier),
        "failed": [{**asdict(trial), "reason": reason} for trial, reason in comparison.failed.items()],
        "left_out": json.loads(json.dumps(comparison.left_out, default=str)),
    }


def _frontier_lines(frontier: Frontier) -> list[str]:
    """The drift of every method at the loss that all of them reach, its curve, and every point of it."""
    common = _text(Spread.of(frontier.losses.values()), ".4f")
    seeds = ", ".join(map(str, frontier.seeds))
    lines = [
        f"## Drift at equal {frontier.what}",
        "",
        f"Drift is KL(base || tuned), in nats per token. Methods are compared at the {frontier.what} that every one of "
        f"them reaches, the highest of their lowest ones: {common} (seeds with all learning rates: {seeds}). Between "
        f"two learning rates the logarithm of the drift is linear in the loss; of several places with this loss the "
        f"one of the lowest rate counts.",
        "",
        *_table(
            ["method", "drift at equal loss", "seeds"],
            [
                [one.method, _text(one.spread, ".4f"), ", ".join(map(str, one.drifts)) or "-"]
                for one in frontier.at_equal_loss
            ],
        ),
        "",
    ]
    reasons = [
        f"- {one.method}, seed {seed}: {why}." for one in frontier.at_equal_loss for seed, why in one.reasons.items()
    ]
    lines += [*reasons, *([""] if reasons else []), f"![{frontier.what} against drift](frontier.png)", ""]
    rows = []
    for method, curves in frontier.curves.items():
        points = [(seed, point) for seed, curve in curves.items() for point in curve]
        for rate in sorted({point.learning_rate for _, point in points}):
            here = [(seed, point) for seed, point in points if point.learning_rate == rate]
            loss, drift = (Spread.of(getattr(point, name) for _, point in here) for name in ("loss", "drift"))
            rows.append(
                [method, f"{rate:g}", ", ".join(str(s) for s, _ in here), _text(loss, ".4f"), _text(drift, ".4f")]
            )
    return lines + _table(["method", "learning rate", "seeds", frontier.what, "drift"], rows)


def _equal_cells(frontier: Frontier, method: str) -> list[float | int | None]:
    """The cells of a method's row of the CSV table: the common loss, then its drift there, deviation and seeds."""
    common = Spread.of(frontier.losses.values())
    found = next((one.spread for one in frontier.at_equal_loss if one.method == method), None)
    return [common and common.mean, *((found.mean, found.deviation, found.count) if found else (None, None, 0))]


def _frontier_dict(frontier: Frontier) -> dict:
    return {
        "loss": frontier.what,
        "equal_loss": frontier.losses,
        "interpolation": "log drift linear in loss",
        "drift_at_equal_loss": [
            {"method": one.method, "by_seed": one.drifts, "reasons": one.reasons, "spread": _dict(one.spread)}
            for one in frontier.at_equal_loss
        ],
        "curves": {
            method: {seed: [asdict(point) for point in curve] for seed, curve in curves.items()}
            for method, curves in frontier.curves.items()
        },
    }


def _setup(comparison: Comparison) -> list[str]:
    """Lines on what the runs have in common, with a warning where they ran on different numbers of ranks."""
    config = comparison.settings
    lines = [
        f"{config.model} on {', '.join(source.path for source in sources_of(config.data).values())}, {_rank(config)}."
    ]
    ranks = sorted({run.report["world_size"] for run in comparison.runs})
    if ranks:
        report = comparison.runs[0].report
        versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
        lines += [f"{report['steps']} steps on {ranks[0]} {'rank' if ranks == [1] else 'ranks'}. {versions}."]
    if len(ranks) > 1:
        lines += ["", f"**The runs were made on different numbers of ranks ({', '.join(map(str, ranks))}).**"]
    lines += ["Mean ± standard deviation over the seeds; a seed draws the data's order and LoRA's start."]
    return lines


def _rank(config: RunConfig) -> str:
    targets = config.adapter.targets if isinstance(config.adapter.targets, str) else ", ".join(config.adapter.targets)
    return f"rank {config.adapter.rank} on {targets}"


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


def _text(spread: Spread | None, form: str) -> str:
    if spread is None:
        return "-"
    same = not spread.deviation
    return f"{spread.mean:{form}}" if same else f"{spread.mean:{form}} ± {spread.deviation:{form}}"


def _dict(spread: Spread | None) -> dict | None:
    return None if spread is None else asdict(spread)
