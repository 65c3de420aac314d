"""What a lower loss costs in drift: each method's curve over its learning rates, and its drift at a common loss.

Curves run in the order of learning rates: from little learned and little forgotten to the method's best loss, and often
on to rates that are too high. The loss at which methods are compared is the highest of their lowest losses, which is
the lowest that every method reaches. A method's drift there is interpolated along its curve.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from sorsa_ds.study.compare.results import HELD_OUT, Result, Spread


@dataclass(frozen=True, slots=True)
class Point:
    """One run. loss: its held-out loss. drift: KL(base || tuned). Both in nats per token."""

    learning_rate: float
    loss: float
    drift: float


Curve = Sequence[Point]
"""Points of one method in the order of their learning rates; at least one."""


@dataclass(frozen=True, slots=True)
class AtEqualLoss:
    """A method's drift at the loss that all methods reach.

    drifts: seed -> drift. reasons: seed -> why there is none.
    """

    method: str
    drifts: dict[int, float]
    reasons: dict[int, str]

    @property
    def spread(self) -> Spread | None:
        """Mean and deviation over the seeds; None where no seed's curve reaches the loss."""
        return Spread.of(self.drifts.values())


@dataclass(frozen=True, slots=True)
class Frontier:
    """The curves of a comparison, and what is read from them.

    what: the loss that curves have. curves: method -> seed -> curve; a seed may have run at the best rate alone.
    losses: seed -> the loss that all methods reach, for the seeds with which every method has run at all of its rates.
    at_equal_loss: one entry per curve.
    """

    what: str
    curves: dict[str, dict[int, Curve]]
    losses: dict[int, float]
    at_equal_loss: list[AtEqualLoss]

    @property
    def seeds(self) -> list[int]:
        """The seeds with which every method has run at all of its rates."""
        return list(self.losses)

    def mean_curve(self, method: str) -> list[Point]:
        """A method's curve as the mean over `seeds`, of loss and of drift at each learning rate."""
        curves = [self.curves[method][seed] for seed in self.seeds]
        rates = [point.learning_rate for point in self.curves[method][self.seeds[0]]]
        at = [[point for curve in curves for point in curve if point.learning_rate == rate] for rate in rates]
        return [
            Point(rate, fmean(p.loss for p in some), fmean(p.drift for p in some))
            for rate, some in zip(rates, at, strict=True)
        ]


def frontier_of(runs: Sequence[Result], methods: Sequence[str], seed: int) -> Frontier | None:
    """The frontier of a comparison's runs; None where none has been measured with the first seed.

    Args:
        runs: all that are finished; their scores are drifts.
        methods: the methods that are compared, in their order.
        seed: the one with which all learning rates were tried.
    """
    measured = [run for run in runs if run.score is not None]
    points: dict[str, dict[int, list[Point]]] = {}
    for run in sorted(measured, key=lambda run: (methods.index(run.trial.method), run.trial.learning_rate)):
        assert run.score is not None, "runs without a score were left out"
        of_method = points.setdefault(run.trial.method, {})
        of_method.setdefault(run.trial.seed, []).append(Point(run.trial.learning_rate, run.criterion, run.score))
    curves: dict[str, dict[int, Curve]] = {name: {**found} for name, found in points.items() if seed in found}
    if not curves:
        return None
    seeds = [
        one for one in dict.fromkeys([seed, *(run.trial.seed for run in measured)]) if _is_whole(curves, one, seed)
    ]
    losses = {one: common_loss({method: found[one] for method, found in curves.items()}) for one in seeds}
    at_equal = []
    for method, found in curves.items():
        drifts, reasons = {}, {}
        for one, loss in losses.items():
            try:
                drifts[one] = drift_at(found[one], loss)
            except NotReached as error:
                reasons[one] = str(error)
        at_equal.append(AtEqualLoss(method, drifts, reasons))
    held_out = all(run.report[HELD_OUT] is not None for run in measured)
    return Frontier("held-out loss" if held_out else "training loss", curves, losses, at_equal)


def _is_whole(curves: Mapping[str, Mapping[int, Curve]], seed: int, first: int) -> bool:
    """Whether every method has, with this seed, all the learning rates that it has with the first one."""
    rates = {
        method: {s: {point.learning_rate for point in curve} for s, curve in found.items()}
        for method, found in curves.items()
    }
    return all(found.get(seed, set()) >= found[first] for found in rates.values())


class NotReached(ValueError):
    """A curve does not come down to a loss from a higher one."""


def common_loss(curves: Mapping[str, Curve]) -> float:
    """The lowest loss that every method reaches: the highest of the methods' lowest losses.

    Args:
        curves: method -> curve.
    """
    return max(min(point.loss for point in curve) for curve in curves.values())


def drift_at(curve: Curve, loss: float) -> float:
    """The drift of a method at a loss, interpolated between two neighbouring learning rates.

    Of several places at which the curve has this loss, the one of the lowest learning rate is taken. Between two points
    the logarithm of the drift is linear in the loss; where the drift of one of them is not above 0, drift itself is.

    Args:
        curve: in the order of learning rates.
        loss: in nats per token.

    Raises:
        NotReached: the loss of the lowest learning rate is lower already, or that of every one is higher.
    """
    first, lowest = curve[0], min(point.loss for point in curve)
    if first.loss < loss:
        raise NotReached(
            f"the lowest learning rate, {first.learning_rate:g}, ends at {first.loss:.4f} already, below {loss:.4f}; "
            f"add a lower one"
        )
    if lowest > loss:
        raise NotReached(f"the lowest loss is {lowest:.4f}, above {loss:.4f}")
    place = next(place for place, point in enumerate(curve) if point.loss <= loss)
    after = curve[place]
    if after.loss == loss:
        return after.drift
    before = curve[place - 1]
    share = (before.loss - loss) / (before.loss - after.loss)
    if min(before.drift, after.drift) > 0:
        return math.exp((1 - share) * math.log(before.drift) + share * math.log(after.drift))
    return (1 - share) * before.drift + share * after.drift
