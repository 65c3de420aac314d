"""Two variants of a part side by side, each at a rate that is named: what is claimed beyond best rates and LoRA."""

from contextlib import suppress
from dataclasses import dataclass

from benchmarks.helpers.evidence_summary import (
    curve_of,
    difference,
    drift_ratios,
    interval_text,
    of_ratios,
    ratio,
    seeds_text,
)
from benchmarks.helpers.evidence_trials import Part, Trial
from sorsa_ds.study.compare.frontier import NotReached, drift_at


@dataclass(frozen=True, slots=True)
class Contrast:
    """A variant at a learning rate, beside another one at its own."""

    variant: str
    rate: float
    peer: str
    peer_rate: float


CONTRASTS: dict[str, tuple[Contrast, ...]] = {
    "small-gsm8k": (
        Contrast("sorsa", 5.6e-3, "pissa", 8.5e-3),
        Contrast("null-space", 1e-2, "lora", 1.4e-2),
        Contrast("null-space", 1e-2, "sorsa", 5.6e-3),
        Contrast("partial", 1.4e-3, "lora", 1e-2),
    ),
    "small-gsm8k-fresh": (
        Contrast("sorsa", 5.6e-3, "pissa", 8.5e-3),
        Contrast("sorsa", 5.6e-3, "lora", 1.4e-2),
        Contrast("null-space", 1e-2, "lora", 1.4e-2),
        Contrast("null-space", 1e-2, "lora", 1e-2),
        Contrast("null-space", 1.4e-2, "lora", 1.4e-2),
        Contrast("null-space", 1e-2, "sorsa", 5.6e-3),
        Contrast("null-space", 1e-2, "trailing", 2.8e-2),
        Contrast("trailing", 2.8e-2, "lora", 1.4e-2),
        Contrast("trailing", 2.8e-2, "lora", 1e-2),
        Contrast("trailing", 2.8e-2, "lora", 7e-3),
        Contrast("trailing", 2e-2, "trailing-no-reg", 2e-2),
    ),
    "small-few": (
        Contrast("sorsa", 1e-3, "pissa", 1.5e-3),
        Contrast("sorsa", 1e-3, "sorsa-no-reg", 1e-3),
        Contrast("null-space", 1.9e-3, "lora", 2.6e-3),
        Contrast("null-space", 1.9e-3, "sorsa", 1e-3),
    ),
    "small-few-fresh": (
        Contrast("sorsa", 1e-3, "pissa", 1.5e-3),
        Contrast("sorsa", 1e-3, "lora", 3.6e-3),
        Contrast("sorsa-strong", 1.4e-3, "lora", 3.6e-3),
        Contrast("trailing", 5e-3, "lora", 3.6e-3),
    ),
    "small-rank32": (Contrast("sorsa", 2.8e-3, "lora", 5e-3), Contrast("trailing", 7.1e-3, "lora", 5e-3)),
    "default-gsm8k": (
        Contrast("sorsa", 1.3e-4, "lora", 3.6e-3),
        Contrast("sorsa", 1.3e-4, "lora", 1.8e-3),
        Contrast("null-space", 6e-4, "lora", 3.6e-3),
        Contrast("null-space", 6e-4, "lora", 1.8e-3),
        Contrast("null-space", 3e-4, "lora", 1.8e-3),
        Contrast("null-space", 6e-4, "sorsa", 1.3e-4),
        Contrast("trailing", 1.2e-3, "lora", 3.6e-3),
        Contrast("trailing", 6e-4, "lora", 1.8e-3),
        Contrast("trailing", 6e-4, "lora", 3.6e-3),
        Contrast("trailing", 1.2e-3, "sorsa", 1.3e-4),
    ),
}
"""Part -> what is set side by side in it, in the order of the table."""


def contrast_table(part: Part, runs: dict[Trial, dict]) -> str:
    """The contrasts of a part that have run with every seed, in Markdown; nothing where there are none."""
    lines = []
    for one in CONTRASTS.get(part.name, ()):
        ours, theirs = part.trials(one.variant, one.rate), part.trials(one.peer, one.peer_rate)
        if all(trial in runs for trial in (*ours, *theirs)):
            loss, english, code = (
                interval_text(difference(runs, ours, theirs, key), "+.3f") for key in ("eval_loss", "english", "code")
            )
            drift = interval_text(ratio(runs, ours, theirs, "drift"), ".2f")
            lines.append(
                f"| {one.variant} {one.rate:g} | {one.peer} {one.peer_rate:g} | {loss} | {drift} "
                f"| {_at_equal_loss(part, runs, one)} | {english} | {code} |"
            )
    head = [
        "| variant | beside | held-out loss | drift, ratio | drift at equal loss, ratio | English | code |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines]) if lines else ""


def _at_equal_loss(part: Part, runs: dict[Trial, dict], one: Contrast) -> str:
    """Drift over the peer's at a loss that both reach.

    In a part that is settled the loss is the variant's own, and the peer's curve over its rates is read there.
    """
    if part.settled:
        ratios = own_loss_ratios(part, runs, one)
    else:
        ratios = drift_ratios(part, runs, one.variant, one.peer)
    if not ratios:
        return "-"
    return interval_text(of_ratios(ratios), ".2f") + (
        f", {seeds_text(len(ratios))}" if len(ratios) < part.seeds else ""
    )


def own_loss_ratios(part: Part, runs: dict[Trial, dict], one: Contrast) -> list[float]:
    """A variant's drift over the peer's at the variant's own loss, for each seed where the peer's curve has that."""
    ratios = []
    for trial in part.trials(one.variant, one.rate):
        row = runs[trial]
        with suppress(NotReached):
            at = drift_at(curve_of(runs, one.peer, trial.seed), float(row["eval_loss"]))
            ratios.append(float(row["drift"]) / at)
    return ratios
