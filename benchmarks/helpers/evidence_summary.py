"""What the runs of the study say: variants against LoRA, paired by seed, with confidence intervals.

A variant's runs are those at its own best rate (`evidence_trials.best_rates`), with every seed of the part. A pair is a
variant and LoRA with one seed: the same data in the same order. Intervals are Student's, at 95 %, over the seeds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev

from scipy import stats

from benchmarks.helpers.evidence_trials import PARTS, PEER, VARIANTS, Part, Trial, best_rates, trial_of
from sorsa_ds.study.compare.frontier import Curve, NotReached, Point, common_loss, drift_at

HEADLINE = "small-gsm8k"
"""The part from which the line of JSON is taken: the one with all variants and most seeds."""
MARGIN = 0.01
"""Nats per token above the lowest loss that two curves reach, where their drifts are compared: near its lowest loss a
curve drifts on without learning more, so that the worse of the two would be read where it is steepest."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % confidence interval; low and high are None where there is one number alone."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval | None":
        """The interval of numbers that are drawn independently; None where there are none."""
        if not values:
            return None
        mean, count = fmean(values), len(values)
        if count == 1:
            return cls(mean, None, None, 1)
        half = stats.t.ppf(0.975, count - 1) * stdev(values) / math.sqrt(count)
        return cls(mean, mean - half, mean + half, count)

    def through(self, function: Callable[[float], float]) -> "Interval":
        """The interval of a growing function of the number, such as exp."""
        ends = (None if end is None else function(end) for end in (self.low, self.high))
        return Interval(function(self.mean), *ends, self.seeds)


@dataclass(frozen=True, slots=True)
class Against:
    """A variant beside LoRA in one part.

    rate: the variant's best. loss, drift: at that rate, means over the seeds. loss_difference: held-out loss minus
    LoRA's at its own best rate; drift_at_best: drift over LoRA's there. drift_ratio: drift over LoRA's, `MARGIN` above
    the lowest loss that both reach, seed by seed; None where no seed's curves reach it, and `missing` counts the seeds
    for which they do not.
    """

    variant: str
    rate: float
    loss: float
    drift: float
    loss_difference: Interval | None
    drift_at_best: Interval | None
    drift_ratio: Interval | None
    missing: int


def against_lora(part: Part, rows: Sequence[dict]) -> list[Against]:
    """Every variant of a part that has all seeds at its best rate, LoRA included."""
    runs = runs_of(part, rows)
    losses = {trial: float(row["eval_loss"]) for trial, row in runs.items()}
    rates = best_rates(part, losses)
    found = []
    for variant, rate in rates.items():
        own = [Trial(part.name, variant, rate, seed) for seed in range(part.seeds)]
        pairs = [(t, Trial(part.name, PEER, rates[PEER], t.seed)) for t in own] if PEER in rates else []
        ratios, missing = drift_ratios(part, runs, variant) if PEER in rates else ([], part.seeds)
        found.append(
            Against(
                variant, rate, fmean(losses[t] for t in own), fmean(float(runs[t]["drift"]) for t in own),
                Interval.of([losses[a] - losses[b] for a, b in pairs]),
                _of_ratios([float(runs[a]["drift"]) / float(runs[b]["drift"]) for a, b in pairs]),
                _of_ratios(ratios), missing,
            )
        )  # fmt: skip
    return found


def _of_ratios(ratios: Sequence[float]) -> Interval | None:
    """The geometric mean of ratios with its interval."""
    logs = Interval.of([math.log(ratio) for ratio in ratios])
    return logs and logs.through(math.exp)


def drift_ratios(part: Part, runs: dict[Trial, dict], variant: str) -> tuple[list[float], int]:
    """Drift over LoRA's at a loss that both reach, for each seed where both curves do; and for how many they do not.

    A seed other than the first has a curve of the best rate, the next one and the two below. A part that is settled
    has no curves: what could be read of the few rates in it would be of those seeds alone that happen to reach a loss.
    """
    if part.settled:
        return [], part.seeds
    ratios, missing = [], 0
    for seed in range(part.seeds):
        curves = {name: curve_of(runs, name, seed) for name in (variant, PEER)}
        if not all(curves.values()):
            missing += 1
            continue
        loss = common_loss(curves) + MARGIN
        try:
            ratios.append(drift_at(curves[variant], loss) / drift_at(curves[PEER], loss))
        except NotReached:
            missing += 1
    return ratios, missing


def runs_of(part: Part, rows: Sequence[dict]) -> dict[Trial, dict]:
    """The rows of a part by the run of which they tell."""
    return {trial_of(row): row for row in rows if row["part"] == part.name}


def curve_of(runs: dict[Trial, dict], variant: str, seed: int) -> Curve:
    """Loss and drift of a variant with one seed, in the order of the learning rates."""
    own = sorted((t for t in runs if (t.variant, t.seed) == (variant, seed)), key=lambda t: t.learning_rate)
    return [Point(t.learning_rate, float(runs[t]["eval_loss"]), float(runs[t]["drift"])) for t in own]


def best_of_sorsa(found: Sequence[Against]) -> Against | None:
    """SORSA's variant with the least drift at equal loss, among those whose loss is not shown to be above LoRA's."""
    ours = [
        one for one in found
        if not VARIANTS[one.variant] or not VARIANTS[one.variant][0].startswith("method=")
        if one.drift_ratio and one.loss_difference and (one.loss_difference.low or 0) <= 0
    ]  # fmt: skip
    return min(ours, key=lambda one: one.drift_ratio.mean if one.drift_ratio else math.inf, default=None)


def summary(rows: Sequence[dict]) -> dict:
    """The line of JSON: how many runs and seeds, and SORSA's best variant against LoRA in the main part and in all.

    Of the parts that are settled, which choose nothing, it has all variants: `confirmed`.
    """
    found_by_part = _found_by_part(rows)
    by_part = {name: _best_told(found) for name, found in found_by_part.items() if not PARTS[name].settled}
    return {
        "runs": len(rows),
        "seeds": len({row["seed"] for row in rows}),
        "parts": sorted({row["part"] for row in rows}),
        **(by_part.get(HEADLINE) or _best_told([])),
        "by_part": by_part,
        "confirmed": {
            name: {one.variant: _at_best_told(one) for one in found if one.variant != PEER}
            for name, found in found_by_part.items()
            if PARTS[name].settled
        },
    }


def _found_by_part(rows: Sequence[dict]) -> dict[str, list[Against]]:
    """What is found in each part that has a variant with all seeds."""
    return {name: found for name, part in PARTS.items() if (found := against_lora(part, rows))}


def _best_told(found: Sequence[Against]) -> dict:
    """SORSA's best variant of a part; nothing but None where all of them are shown to learn less than LoRA."""
    best = best_of_sorsa(found)
    return {
        "best_variant": best and best.variant,
        "loss_vs_lora": best and best.loss_difference and asdict(best.loss_difference),
        "drift_vs_lora_at_equal_loss": best and best.drift_ratio and asdict(best.drift_ratio),
    }


def _at_best_told(one: Against) -> dict:
    """A variant's loss minus LoRA's, and its drift over LoRA's, both at the rates that were settled."""
    return {
        "loss_vs_lora": one.loss_difference and asdict(one.loss_difference),
        "drift_vs_lora": one.drift_at_best and asdict(one.drift_at_best),
    }


def tables(rows: Sequence[dict]) -> str:
    """Tables in Markdown: all parts at a glance, and then every part that has runs with all seeds."""
    by_part = _found_by_part(rows)
    told = [_overview(by_part)]
    for name, found in by_part.items():
        part = PARTS[name]
        heading = f"### {part.name}: {part.seeds} seeds, rank {part.rank}"
        told += [heading, _table(found), _texts(part, rows, found), _spectra(part, rows, found)]
        told.append(_regulariser(part, rows))
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
    """A variant in one part, in few characters."""
    if one is None:
        return ""
    return f"{_bold(one.loss_difference, '+.3f', 0.0)}, {_bold(one.drift_ratio, '.2f', 1.0)}"


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
        ratio = "-" if one.drift_ratio is None else _told(one.drift_ratio, ".2f") + f", {one.drift_ratio.seeds} seeds"
        lines.append(
            f"| {one.variant} | {one.rate:g} | {one.loss:.4f} | {_told(one.loss_difference, '+.4f')} "
            f"| {one.drift:.3f} | {_told(one.drift_at_best, '.2f')} | {ratio} |"
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
        lines.append(
            f"| {one.variant} | {_mean(own, 'english'):.3f} | {_told(Interval.of(pairs), '+.3f')} "
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
                    _told(Interval.of([float(runs[a][key]) - float(runs[b][key]) for a, b in pairs]), "+.3f")
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


def _told(interval: Interval | None, form: str) -> str:
    if interval is None:
        return "-"
    ends = "" if interval.low is None else f" ({interval.low:{form}} to {interval.high:{form}})"
    return f"{interval.mean:{form}}{ends}"
