"""The pictures of the study: held-out loss against drift in each part, one curve per variant over its rates."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.helpers.evidence_summary import curve_of, runs_of
from benchmarks.helpers.evidence_trials import PARTS, Part
from sorsa_ds.study.compare.figure import draw_frontier, looks_of
from sorsa_ds.study.compare.frontier import Frontier, common_loss

SHOWN = (
    "lora", "pissa", "dora", "partial", "full", "sorsa", "sorsa-strong", "null-space", "trailing", "trailing-no-reg",
    "trailing-sqrt",
)  # fmt: skip
"""The variants that a picture has room for; the tables have all."""

LOOKS = looks_of(SHOWN)


def draw(rows: Sequence[dict], folder: Path) -> list[Path]:
    """Write evidence-PART.png for every part in which two variants have curves with every seed; returns the paths.

    A part that is settled has a few rates for each variant, often one, and so no curves.
    """
    written = []
    for part in (part for part in PARTS.values() if not part.settled):
        frontier = frontier_of(part, rows)
        if len(frontier.curves) > 1:
            with tempfile.TemporaryDirectory() as scratch:
                draw_frontier(frontier, Path(scratch), LOOKS)
                target = folder / f"evidence-{part.name}.png"
                target.write_bytes((Path(scratch) / "frontier.png").read_bytes())
            written.append(target)
    return written


def frontier_of(part: Part, rows: Sequence[dict]) -> Frontier:
    """The curves of the variants that are shown, over the learning rates at which they have run with every seed.

    A variant with one such rate has no curve.
    """
    runs = runs_of(part, rows)
    curves = {}
    for variant in (name for name in SHOWN if name in part.variants):
        points = [{p.learning_rate: p for p in curve_of(runs, variant, seed)} for seed in range(part.seeds)]
        if len(rates := sorted(set.intersection(*map(set, points)))) > 1:
            curves[variant] = {seed: [own[rate] for rate in rates] for seed, own in enumerate(points)}
    losses = {seed: common_loss({v: own[seed] for v, own in curves.items()}) for seed in range(part.seeds) if curves}
    return Frontier("held-out loss", curves, losses, [])
