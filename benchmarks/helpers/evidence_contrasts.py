"""Two variants of a part side by side, each at a rate that is named: what is claimed beyond best rates and LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.helpers.evidence_summary import Interval, curve_of, drift_ratios, interval_text, of_ratios
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
    "small-gsm8k": (Contrast("sorsa", 5.6e-3, "pissa", 8.5e-3),),
    "small-gsm8k-fresh": (
        Contrast("sorsa", 5.6e-3, "pissa", 8.5e-3),
        Contrast("sorsa", 5.6e-3, "lora", 1.4e-2),
        Contrast("trailing", 2.8e-2, "lora", 1.4e-2),
        Contrast("trailing", 2.8e-2, "lora", 1e-2),
        Contrast("trailing", 2.8e-2, "lora", 7e-3),
        Contrast("trailing", 2e-2, "trailing-no-reg", 2e-2),
    ),
    "small-few": (Contrast("sorsa", 1e-3, "pissa", 1.5e-3), Contrast("sorsa", 1e-3, "sorsa-no-reg", 1e-3)),
    "small-few-fresh": (
        Contrast("sorsa", 1e-3, "pissa", 1.5e-3),
        Contrast("sorsa", 1e-3, "lora", 3.6e-3),
        Contrast("sorsa-strong", 1.4e-3, "lora", 3.6e-3),
        Contrast("trailing", 5e-3, "lora", 3.6e-3),
    ),
}
"""Part -> what is set side by side in it, in the order of the table."""


def contrast_table(part: Part, runs: dict[Trial, dict]) -> str:
    """The contrasts of a part that have run with every seed, in Markdown; nothing where there are none."""
    lines = [_line(part, runs, one) for one in CONTRASTS.get(part.name, ()) if _is_whole(part, runs, one)]
    if not lines:
        return ""
    head = [
        "| variant | beside | held-out loss | drift, ratio | drift at equal loss, ratio | English | code |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines])


def _line(part: Part, runs: dict[Trial, dict], one: Contrast) -> str:
    drift = [a / b for a, b in zip(*(_values(part, runs, side, "drift") for side in _sides(one)), strict=True)]
    loss, english, code = (
        interval_text(_difference(part, runs, one, key), "+.3f") for key in ("eval_loss", "english", "code")
    )
    ratio = interval_text(of_ratios(drift), ".2f")
    return (
        f"| {one.variant} {one.rate:g} | {one.peer} {one.peer_rate:g} | {loss} | {ratio} "
        f"| {_at_equal_loss(part, runs, one)} | {english} | {code} |"
    )


def _sides(one: Contrast) -> tuple[tuple[str, float], tuple[str, float]]:
    return (one.variant, one.rate), (one.peer, one.peer_rate)


def _trials(part: Part, side: tuple[str, float]) -> list[Trial]:
    return [Trial(part.name, *side, seed) for seed in range(part.seeds)]


def _is_whole(part: Part, runs: dict[Trial, dict], one: Contrast) -> bool:
    return all(trial in runs for side in _sides(one) for trial in _trials(part, side))


def _values(part: Part, runs: dict[Trial, dict], side: tuple[str, float], key: str) -> list[float]:
    return [float(runs[trial][key]) for trial in _trials(part, side)]


def _difference(part: Part, runs: dict[Trial, dict], one: Contrast, key: str) -> Interval | None:
    ours, theirs = (_values(part, runs, side, key) for side in _sides(one))
    return Interval.of([a - b for a, b in zip(ours, theirs, strict=True)])


def _at_equal_loss(part: Part, runs: dict[Trial, dict], one: Contrast) -> str:
    """Drift over the peer's at a loss that both reach.

    In a part that is settled the loss is the variant's own, and the peer's curve over its rates is read there.
    """
    if part.settled:
        ratios, missing = own_loss_ratios(part, runs, one)
    else:
        ratios, missing = drift_ratios(part, runs, one.variant, one.peer)
    if not ratios:
        return "-"
    return interval_text(of_ratios(ratios), ".2f") + (f", {len(ratios)} seeds" if missing else "")


def own_loss_ratios(part: Part, runs: dict[Trial, dict], one: Contrast) -> tuple[Sequence[float], int]:
    """A variant's drift over the peer's at the variant's own loss; and for how many seeds the peer has no such loss."""
    ratios: list[float] = []
    for trial in _trials(part, (one.variant, one.rate)):
        curve = curve_of(runs, one.peer, trial.seed)
        try:
            at = drift_at(curve, float(runs[trial]["eval_loss"])) if len(curve) > 1 else None
        except NotReached:
            at = None
        if at is not None:
            ratios.append(float(runs[trial]["drift"]) / at)
    return ratios, part.seeds - len(ratios)
