"""The study's tables in Markdown: all parts at a glance, then the losses, drifts, texts and spectra of each."""

from collections.abc import Sequence
from statistics import fmean, median

from benchmarks.helpers.evidence_contrasts import contrast_table
from benchmarks.helpers.evidence_summary import (
    Against,
    Interval,
    difference,
    found_by_part,
    interval_text,
    runs_of,
    seeds_text,
)
from benchmarks.helpers.evidence_trials import PARTS, PEER, VARIANTS, Part, Trial


def tables(rows: Sequence[dict]) -> str:
    """Tables in Markdown: all parts at a glance, and then every part that has runs with all seeds."""
    by_part = found_by_part(rows)
    told = [_overview(by_part)]
    for name, found in by_part.items():
        part = PARTS[name]
        runs = runs_of(part, rows)
        heading = f"### {part.name}: {part.seeds} seeds, rank {part.rank}"
        told += [heading, _table(found), _texts(part, runs, found), _spectra(part, runs, found)]
        told += [_regulariser(part, runs), contrast_table(part, runs)]
    return "\n\n".join(filter(None, told))


def _overview(by_part: dict[str, list[Against]]) -> str:
    """Each variant in each part: loss minus LoRA's, drift over LoRA's; bold where the interval leaves out equality."""
    cells = {(one.variant, name): one for name, found in by_part.items() for one in found}
    lines = [f"| variant | {' | '.join(by_part)} |", f"|---|{'---|' * len(by_part)}"]
    for variant in VARIANTS:
        if variant != PEER and any((variant, name) in cells for name in by_part):
            told = [_glance(cells.get((variant, name))) for name in by_part]
            lines.append(f"| {variant} | {' | '.join(told)} |")
    return "\n".join(lines)


def _glance(one: Against | None) -> str:
    """A variant in one part, in few characters; drift is left out where a seed does not reach an equal loss."""
    if one is None:
        return ""
    drift = None if one.missing else one.drift_ratio
    return f"{_bold(one.loss_difference, '+.3f', 0.0)}, {_bold(drift, '.2f', 1.0)}"


def _bold(interval: Interval | None, form: str, equal: float) -> str:
    """A mean, bold where its interval leaves out what would be no difference; a dash where there is none."""
    if interval is None:
        return "-"
    apart = interval.low is not None and not interval.low <= equal <= interval.high
    return f"**{interval.mean:{form}}**" if apart else f"{interval.mean:{form}}"


def _table(found: Sequence[Against]) -> str:
    lines = [
        "| variant | best rate | held-out loss | minus LoRA's | drift | drift / LoRA's | the same at equal loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in sorted(found, key=lambda one: one.loss):
        if one.variant == PEER:
            lines.append(f"| {one.variant} | {one.rate:g} | {one.loss:.4f} | | {one.drift:.3f} | | |")
            continue
        ratio = (
            "-"
            if one.drift_ratio is None
            else interval_text(one.drift_ratio, ".2f") + f", {seeds_text(one.drift_ratio.seeds)}"
        )
        lines.append(
            f"| {one.variant} | {one.rate:g} | {one.loss:.4f} | {interval_text(one.loss_difference, '+.4f')} "
            f"| {one.drift:.3f} | {interval_text(one.drift_at_best, '.2f')} | {ratio} |"
        )
    return "\n".join(lines)


def _texts(part: Part, runs: dict[Trial, dict], found: Sequence[Against]) -> str:
    """What became of English, of code and of choices at each variant's best rate; English beside LoRA's, by seed."""
    base = next(iter(runs.values()))
    lines = [
        "| variant | English, nats per token | minus LoRA's | code | right choices |",
        "|---|---|---|---|---|",
        f"| the base model | {float(base['english_base']):.3f} | | {float(base['code_base']):.3f} "
        f"| {_choices([base], 'choices_base')} |",
    ]
    of_lora = next((part.trials(PEER, one.rate) for one in found if one.variant == PEER), [])
    for one in found:
        trials = part.trials(one.variant, one.rate)
        own = [runs[trial] for trial in trials]
        apart = "" if one.variant == PEER else interval_text(difference(runs, trials, of_lora, "english"), "+.3f")
        lines.append(
            f"| {one.variant} | {_mean(own, 'english'):.3f} | {apart} "
            f"| {_mean(own, 'code'):.3f} | {_choices(own, 'choices')} |"
        )
    return "\n".join(lines)


def _choices(rows: Sequence[dict], key: str) -> str:
    """The mean share of right choices, or a dash where the part makes none."""
    return f"{_mean(rows, key):.2f}" if all(row[key] for row in rows) else "-"


def _spectra(part: Part, runs: dict[Trial, dict], found: Sequence[Against]) -> str:
    """What became of the weights and of the factors at each variant's best rate; the median of condition numbers."""
    lines = [
        "| variant | change of W | Delta-Sigma | Delta-D | kappa(W) | ‖XᵀX − I‖ | kappa(U) |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        own = [runs[trial] for trial in part.trials(one.variant, one.rate)]
        factors = "| - | - |"
        if own[0]["orthonormality"]:
            factors = f"| {_mean(own, 'orthonormality'):.2g} | {_mean(own, 'kappa_U'):.3f} |"
        kappa = median(float(row["kappa_W"]) for row in own)
        lines.append(
            f"| {one.variant} | {_mean(own, 'change'):.3f} | {_mean(own, 'delta_sigma'):.3f} "
            f"| {_mean(own, 'delta_d'):.3f} | {kappa:.0f} {factors}"
        )
    return "\n".join(lines)


def _regulariser(part: Part, runs: dict[Trial, dict]) -> str:
    """What the regulariser changes at one learning rate, seed by seed: loss and drift with it, minus those without."""
    lines = []
    for variant in ("sorsa", "null-space", "trailing"):
        for rate in sorted({t.learning_rate for t in runs if t.variant == variant}):
            ours, theirs = (part.trials(name, rate) for name in (variant, f"{variant}-no-reg"))
            if all(trial in runs for trial in (*ours, *theirs)):
                told = (interval_text(difference(runs, ours, theirs, key), "+.3f") for key in ("eval_loss", "drift"))
                lines.append(f"| {variant} | {rate:g} | {' | '.join(told)} |")
    head = ["| with and without the regulariser | rate | held-out loss | drift |", "|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def _mean(rows: Sequence[dict], key: str) -> float:
    return fmean(float(row[key]) for row in rows)
