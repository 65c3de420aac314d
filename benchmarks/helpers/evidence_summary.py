"""What the runs of the study say: variants against LoRA, paired by seed, with confidence intervals.

A variant's runs are those at its own best rate (`evidence_trials.best_rates`), with every seed of the part. A pair is a
variant and LoRA with one seed: the same data in the same order. Intervals are Student's, at 95 %, over the seeds.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import fmean, stdev

from scipy import stats

from benchmarks.helpers.evidence_trials import PARTS, PEER, VARIANTS, Part, Trial, best_rates, due, trial_of
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
    """Every variant of a part that has all seeds at its best rate, LoRA included.

    Of a part that is settled, a variant is told when it has run with every seed at each of its rates, and so has LoRA.
    As long as one run is missing, another rate would pass for the best.
    """
    runs = runs_of(part, rows)
    losses = {trial: float(row["eval_loss"]) for trial, row in runs.items()}
    if part.settled:
        lacking = {trial.variant for trial in due(part, losses)}
        losses = {} if PEER in lacking else {t: loss for t, loss in losses.items() if t.variant not in lacking}
    rates = best_rates(part, losses)
    of_lora = part.trials(PEER, rates[PEER]) if PEER in rates else []
    found = []
    for variant, rate in rates.items():
        own = part.trials(variant, rate)
        # A part that is settled has no curves: what could be read of its few rates would be of those seeds alone that
        # happen to reach a loss.
        ratios = drift_ratios(part, runs, variant) if of_lora and not part.settled else []
        found.append(
            Against(
                variant, rate, fmean(losses[t] for t in own), fmean(values(runs, own, "drift")),
                difference(runs, own, of_lora, "eval_loss"), ratio(runs, own, of_lora, "drift"),
                of_ratios(ratios), part.seeds - len(ratios),
            )
        )  # fmt: skip
    return found


def values(runs: dict[Trial, dict], trials: Sequence[Trial], key: str) -> list[float]:
    """What the rows of some runs have in one column."""
    return [float(runs[trial][key]) for trial in trials]


def difference(runs: dict[Trial, dict], ours: Sequence[Trial], theirs: Sequence[Trial], key: str) -> Interval | None:
    """What runs have in one column minus what their pairs have, pair by pair; None where there are no others."""
    if not theirs:
        return None
    return Interval.of([a - b for a, b in zip(values(runs, ours, key), values(runs, theirs, key), strict=True)])


def ratio(runs: dict[Trial, dict], ours: Sequence[Trial], theirs: Sequence[Trial], key: str) -> Interval | None:
    """What runs have in one column over what their pairs have, pair by pair; None where there are no others."""
    if not theirs:
        return None
    return of_ratios([a / b for a, b in zip(values(runs, ours, key), values(runs, theirs, key), strict=True)])


def of_ratios(ratios: Sequence[float]) -> Interval | None:
    """The geometric mean of ratios with its interval."""
    logs = Interval.of([math.log(ratio) for ratio in ratios])
    return logs and logs.through(math.exp)


def drift_ratios(part: Part, runs: dict[Trial, dict], variant: str, peer: str = PEER) -> list[float]:
    """Drift over the peer's at a loss that both reach, for each seed where both curves do.

    A seed other than the first has a curve of the best rate, the next one and the two below.
    """
    ratios = []
    for seed in range(part.seeds):
        curves = {name: curve_of(runs, name, seed) for name in (variant, peer)}
        if not all(curves.values()):
            continue
        loss = common_loss(curves) + MARGIN
        with suppress(NotReached):
            ratios.append(drift_at(curves[variant], loss) / drift_at(curves[peer], loss))
    return ratios


def runs_of(part: Part, rows: Sequence[dict]) -> dict[Trial, dict]:
    """The rows of a part by the run of which they tell."""
    return {trial_of(row): row for row in rows if row["part"] == part.name}


def curve_of(runs: dict[Trial, dict], variant: str, seed: int) -> Curve:
    """Loss and drift of a variant with one seed, in the order of the learning rates."""
    own = sorted((t for t in runs if (t.variant, t.seed) == (variant, seed)), key=lambda t: t.learning_rate)
    return [Point(t.learning_rate, float(runs[t]["eval_loss"]), float(runs[t]["drift"])) for t in own]


def best_of_sorsa(found: Sequence[Against]) -> Against | None:
    """SORSA's variant with the lowest held-out loss; whether that is LoRA's or lower, its interval tells."""
    ours = [one for one in found if not VARIANTS[one.variant] or not VARIANTS[one.variant][0].startswith("method=")]
    return min(ours, key=lambda one: one.loss, default=None)


def summary(rows: Sequence[dict]) -> dict:
    """The line of JSON: how many runs and seeds, and SORSA's best variant against LoRA in the main part and in all.

    Of the parts that are settled, which choose nothing, it has all variants: `settled`.
    """
    by_name = found_by_part(rows)
    by_part = {name: _best_told(found) for name, found in by_name.items() if not PARTS[name].settled}
    return {
        "runs": len(rows),
        "seeds": len({PARTS[row["part"]].first_seed + int(row["seed"]) for row in rows}),
        "parts": sorted({row["part"] for row in rows}),
        **(by_part.get(HEADLINE) or _best_told([])),
        "by_part": by_part,
        "settled": {
            name: {one.variant: _at_best_told(one) for one in found if one.variant != PEER}
            for name, found in by_name.items()
            if PARTS[name].settled
        },
    }


def found_by_part(rows: Sequence[dict]) -> dict[str, list[Against]]:
    """What is found in each part that has a variant with all seeds."""
    return {name: found for name, part in PARTS.items() if (found := against_lora(part, rows))}


def _best_told(found: Sequence[Against]) -> dict:
    """SORSA's best variant of a part; nothing but None where the part has none with all seeds."""
    best = best_of_sorsa(found)
    return {
        "best_variant": best and best.variant,
        "loss_vs_lora": best and best.loss_difference and asdict(best.loss_difference),
        "drift_vs_lora_at_equal_loss": best and best.drift_ratio and asdict(best.drift_ratio),
    }


def _at_best_told(one: Against) -> dict:
    """A variant's loss minus LoRA's, and its drift over LoRA's, both at the rates that were settled."""
    return {
        "learning_rate": one.rate,
        "loss_vs_lora": one.loss_difference and asdict(one.loss_difference),
        "drift_vs_lora": one.drift_at_best and asdict(one.drift_at_best),
    }


def interval_text(interval: Interval | None, form: str) -> str:
    """An interval for a table, each number in the given form; a dash where there is none."""
    if interval is None:
        return "-"
    ends = "" if interval.low is None else f" ({interval.low:{form}} to {interval.high:{form}})"
    return f"{interval.mean:{form}}{ends}"


def seeds_text(count: int) -> str:
    """A number of seeds in words."""
    return f"{count} seed" if count == 1 else f"{count} seeds"
