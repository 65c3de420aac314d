"""The pictures of the study: held-out loss against drift in each part, one curve per variant over its rates."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.helpers.evidence_summary import curve_of
from benchmarks.helpers.evidence_trials import PARTS, Part, trial_of
from sorsa_ds.study.compare.figure import draw_frontier, looks_of
from sorsa_ds.study.compare.frontier import Frontier, common_loss

SHOWN = (
    "lora", "pissa", "dora", "partial", "full", "sorsa", "sorsa-strong", "trailing", "trailing-no-reg", "trailing-sqrt",
)  # fmt: skip
"""The variants that a picture has room for; the tables have all."""

LOOKS = looks_of(SHOWN)


def draw(rows: Sequence[dict], folder: Path) -> list[Path]:
    """Write evidence-PART.png for every part in which at least two variants have all learning rates; returns them."""
    written = []
    for part in PARTS.values():
        frontier = frontier_of(part, rows)
        if len(frontier.curves) > 1:
            with tempfile.TemporaryDirectory() as scratch:
                draw_frontier(frontier, Path(scratch), LOOKS)
                target = folder / f"evidence-{part.name}.png"
                target.write_bytes((Path(scratch) / "frontier.png").read_bytes())
            written.append(target)
    return written


def frontier_of(part: Part, rows: Sequence[dict]) -> Frontier:
    """The curves of a part's variants: all rates with the first seed, and the runs of the other seeds."""
    runs = {trial_of(row): row for row in rows if row["part"] == part.name}
    curves = {}
    for variant in (name for name in SHOWN if name in part.variants):
        own = {seed: curve_of(runs, variant, seed) for seed in range(part.seeds)}
        if len(own[0]) >= len(part.rates[variant]):
            curves[variant] = {seed: curve for seed, curve in own.items() if curve}
    firsts = {variant: of_seed[0] for variant, of_seed in curves.items()}
    return Frontier("held-out loss", curves, {0: common_loss(firsts)} if firsts else {}, [])
