"""How the initialisation went: one record per layer, a table by kind of layer, and JSON for the run folder."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from sorsa_ds.model.factor_cache import CachedDecomposition
from sorsa_ds.model.targets import Target
from sorsa_ds.sorsa import truncated_svd
from sorsa_ds.sorsa.decompose import Decomposition
from sorsa_ds.sorsa.residual_storage import Storage


@dataclass(frozen=True, slots=True)
class QuantisationLoss:
    """What a layer loses by its quantised residual Q, against what it would lose by quantising W itself.

    error: ||W - (Q + U diag(s) V^T)||_F / ||W||_F.
    plain_error: ||W - quantised W||_F / ||W||_F in the same storage, the error from which QLoRA starts.
    """

    error: float
    plain_error: float

    @classmethod
    def of(cls, storage: Storage, weight: Tensor, rest: Tensor, packed: Sequence[Tensor]) -> "QuantisationLoss":
        """Measure both errors of a layer.

        Args:
            rest: the residual before packing; it is overwritten.
            packed: the residual as the storage keeps it.
        """
        shape = (rest.shape[0], rest.shape[1])
        lost = truncated_svd.energy(rest.sub_(storage.dense(packed, shape, rest.dtype)))
        whole = rest.copy_(weight)
        energy = truncated_svd.energy(whole) or 1.0
        plain = truncated_svd.energy(storage.dense(storage.pack(whole), shape, rest.dtype).sub_(whole))
        return cls((lost / energy) ** 0.5, (plain / energy) ** 0.5)

    @classmethod
    def mean(cls, losses: Sequence["QuantisationLoss"]) -> "QuantisationLoss":
        """The root mean squares of the losses of several matrices."""
        errors, plain = [one.error for one in losses], [one.plain_error for one in losses]
        return cls(_root_mean_square(errors), _root_mean_square(plain))


ROUNDING = 1e-12
"""Of trailing triplets, the share of ||W||_F^2 below which they are rounding: that of fp32 numbers is some 1e-14."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """How one layer was decomposed. Of experts, the worst stands for all, and means are taken of shares and losses.

    experts: how many matrices it is; 0: a linear.
    captured: share of ||W||_F^2 in the principal part.
    excess: estimated (residual energy - optimum) / optimum.
    way: `exact` or `krylov`.
    capped: whether the iteration ended before it reached the tolerance.
    s_rms: root mean square of the singular values that are trained.
    cached: whether the factors were read from the cache.
    seconds: spent on reading, decomposing and taking the residual.
    gib: size of residual and factors, all ranks' parts together.
    owner: the rank that made the layer.
    loss: what quantising has cost; None where the residual is not quantised.
    """

    name: str
    shape: tuple[int, int]
    experts: int
    rank: int
    captured: float
    excess: float
    way: str
    iterations: int
    capped: bool
    s_rms: float
    cached: bool
    seconds: float
    gib: float
    owner: int
    loss: QuantisationLoss | None

    @property
    def is_rounding(self) -> bool:
        """Whether what is trained is no more than rounding of the weight, as where that lacks rank."""
        return self.captured < ROUNDING

    @classmethod
    def from_json(cls, told: dict) -> "LayerReport":
        """The report of which `told` is the `dataclasses.asdict`, after a way through JSON."""
        loss = told["loss"] and QuantisationLoss(**told["loss"])
        return cls(**{**told, "shape": tuple(told["shape"]), "loss": loss})

    @classmethod
    def of(
        cls,
        target: Target,
        found: Decomposition,
        owner: int,
        seconds: float,
        tensors: Sequence[Tensor],
        loss: QuantisationLoss | None,
    ) -> "LayerReport":
        """The record of a layer whose decomposition was just made, or just read from the cache."""
        return cls(
            name=target.name,
            shape=(target.out_features, target.in_features),
            experts=target.experts,
            rank=target.rank,
            s_rms=found.s.double().square().mean().sqrt().item(),
            cached=isinstance(found, CachedDecomposition),
            seconds=seconds,
            gib=sum(tensor.nbytes for tensor in tensors) / 2**30,
            owner=owner,
            loss=loss,
            **asdict(found.accuracy),
        )


def table(reports: Sequence[LayerReport]) -> str:
    """A table with one line per kind of layer, a kind being the last part of the layers' names.

    The columns error and plain are root mean squares of `QuantisationLoss` over the layers of a kind.
    """
    kinds: dict[str, list[LayerReport]] = defaultdict(list)
    for report in reports:
        parts = report.name.split(".")
        kinds[".".join(parts[-2:] if report.experts else parts[-1:])].append(report)
    columns = [("captured", 9), ("excess", 9), ("seconds", 8), ("GiB", 7)]
    if all(report.loss for report in reports):
        columns += [("error", 9), ("plain", 9)]
    heads = " ".join(f"{name:>{width}}" for name, width in columns)
    width = max(12, *map(len, kinds))
    shapes = {kind: _one({_shape(report) for report in some}) for kind, some in kinds.items()}
    wide = max(13, *map(len, shapes.values()))
    lines = [f"  {'layer kind':<{width}} {'count':>5} {'shape':>{wide}} {'r':>4} {heads}  way"]
    for kind, some in kinds.items():
        ranks = {r.rank for r in some}
        ways = sorted({r.way + (" (cached)" if r.cached else "") for r in some})
        lines.append(
            f"  {kind:<{width}} {len(some):>5} {shapes[kind]:>{wide}} {_one(ranks):>4} "
            f"{sum(r.captured for r in some) / len(some):>9.2%} {max(r.excess for r in some):>9.1e} "
            f"{sum(r.seconds for r in some):>8.1f} {sum(r.gib for r in some):>7.3f}{_losses(some)}  {', '.join(ways)}"
        )
    missed = [r.name for r in reports if r.capped]
    if missed:
        lines.append(f"  {len(missed)} layers ended above the tolerance, first {missed[0]}")
    return "\n".join(lines)


def as_json(reports: Sequence[LayerReport], *, seconds: float, world_size: int, peak_gib: Sequence[float]) -> dict:
    """All records and their totals, ready for JSON.

    Args:
        seconds: duration of the whole initialisation.
        peak_gib: largest resident memory of each rank.
    """
    return {
        "seconds": seconds,
        "world_size": world_size,
        "seconds_by_rank": [sum(r.seconds for r in reports if r.owner == rank) for rank in range(world_size)],
        "peak_resident_gib_by_rank": list(peak_gib),
        "from_cache": sum(r.cached for r in reports),
        "layers": [asdict(report) for report in reports],
    }


def _losses(some: Sequence[LayerReport]) -> str:
    """The columns error and plain of one kind of layer; nothing where the residual is not quantised."""
    losses = [r.loss for r in some if r.loss]
    if len(losses) < len(some):
        return ""
    pairs = ([x.error for x in losses], [x.plain_error for x in losses])
    return "".join(f" {_root_mean_square(values):>9.2%}" for values in pairs)


def _root_mean_square(values: Sequence[float]) -> float:
    return (sum(value * value for value in values) / len(values)) ** 0.5


def _shape(report: LayerReport) -> str:
    sides = [report.experts, *report.shape] if report.experts else report.shape
    return " x ".join(map(str, sides))


def _one(values: set) -> str:
    return str(next(iter(values))) if len(values) == 1 else "various"
