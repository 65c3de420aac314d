"""The study's tables in Markdown: all parts at a glance, then the losses, drifts, texts and spectra of each."""

from collections.abc import Sequence
from statistics import fmean, median

from benchmarks.helpers.evidence_contrasts import contrast_table
from benchmarks.helpers.evidence_summary import Against, Interval, found_by_part, interval_text, runs_of
from benchmarks.helpers.evidence_trials import PARTS, PEER, VARIANTS, Part, Trial


def tables(rows: Sequence[dict]) -> str:
    """Tables in Markdown: all parts at a glance, and then every part that has runs with all seeds."""
    by_part = found_by_part(rows)
    told = [_overview(by_part)]
    for name, found in by_part.items():
        part = PARTS[name]
        heading = f"### {part.name}: {part.seeds} seeds, rank {part.rank}"
        told += [heading, _table(found), _texts(part, rows, found), _spectra(part, rows, found)]
        told += [_regulariser(part, rows), contrast_table(part, runs_of(part, rows))]
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
            else interval_text(one.drift_ratio, ".2f") + f", {one.drift_ratio.seeds} seeds"
        )
        lines.append(
            f"| {one.variant} | {one.rate:g} | {one.loss:.4f} | {interval_text(one.loss_difference, '+.4f')} "
            f"| {one.drift:.3f} | {interval_text(one.drift_at_best, '.2f')} | {ratio} |"
        )
    return "\n".join(lines)


def _texts(part: Part, rows: Sequence[dict], found: Sequence[Against]) -> str:
    """What became of English, of code and of choices at each variant's best rate; English beside LoRA's, by seed."""
    base = next(row for row in rows if row["part"] == part.name)
    lines = [
        "| variant | English, nats per token | minus LoRA's | code | right choices |",
        "|---|---|---|---|---|",
        f"| the base model | {float(base['english_base']):.3f} | | {float(base['code_base']):.3f} "
        f"| {_choices([base], 'choices_base')} |",
    ]
    of_lora = next((_runs_at(part, rows, one) for one in found if one.variant == PEER), [])
    for one in found:
        own = _runs_at(part, rows, one)
        pairs = [float(a["english"]) - float(b["english"]) for a, b in zip(own, of_lora, strict=bool(of_lora))]
        difference = interval_text(Interval.of(pairs), "+.3f")
        lines.append(
            f"| {one.variant} | {_mean(own, 'english'):.3f} | {'' if one.variant == PEER else difference} "
            f"| {_mean(own, 'code'):.3f} | {_choices(own, 'choices')} |"
        )
    return "\n".join(lines)


def _choices(rows: Sequence[dict], key: str) -> str:
    """The mean share of right choices, or a dash where the part makes none."""
    return f"{_mean(rows, key):.2f}" if all(row[key] for row in rows) else "-"


def _spectra(part: Part, rows: Sequence[dict], found: Sequence[Against]) -> str:
    """What became of the weights and of the factors at each variant's best rate; the median of condition numbers."""
    lines = [
        "| variant | change of W | Delta-Sigma | Delta-D | kappa(W) | ‖XᵀX − I‖ | kappa(U) |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        own = _runs_at(part, rows, one)
        factors = "| - | - |"
        if own[0]["orthonormality"]:
            factors = f"| {_mean(own, 'orthonormality'):.2g} | {_mean(own, 'kappa_U'):.3f} |"
        kappa = median(float(row["kappa_W"]) for row in own)
        lines.append(
            f"| {one.variant} | {_mean(own, 'change'):.3f} | {_mean(own, 'delta_sigma'):.3f} "
            f"| {_mean(own, 'delta_d'):.3f} | {kappa:.0f} {factors}"
        )
    return "\n".join(lines)


def _regulariser(part: Part, rows: Sequence[dict]) -> str:
    """What the regulariser changes at one learning rate, seed by seed: loss and drift with it, minus those without."""
    runs = runs_of(part, rows)
    lines = []
    for variant in ("sorsa", "trailing"):
        for rate in sorted({t.learning_rate for t in runs if t.variant == variant}):
            pairs = [[Trial(part.name, v, rate, k) for v in (variant, f"{variant}-no-reg")] for k in range(part.seeds)]
            if all(t in runs for pair in pairs for t in pair):
                told = (
                    interval_text(Interval.of([float(runs[a][key]) - float(runs[b][key]) for a, b in pairs]), "+.3f")
                    for key in ("eval_loss", "drift")
                )
                lines.append(f"| {variant} | {rate:g} | {' | '.join(told)} |")
    head = ["| with and without the regulariser | rate | held-out loss | drift |", "|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def _runs_at(part: Part, rows: Sequence[dict], one: Against) -> list[dict]:
    """A variant's rows at its best rate, in the order of the seeds."""
    runs = runs_of(part, rows)
    return [runs[Trial(part.name, one.variant, one.rate, seed)] for seed in range(part.seeds)]


def _mean(rows: Sequence[dict], key: str) -> float:
    return fmean(float(row[key]) for row in rows)
