"""How the initialisation went: one record a layer, a table a kind of layer, and JSON for the run folder."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from sorsa_ds.decompose import Decomposition
from sorsa_ds.factor_cache import CachedDecomposition
from sorsa_ds.surgery import Target


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer's decomposition.

    captured: share of ||W||_F^2 in the principal part. excess: estimated (residual energy - optimum) / optimum.
    way: `exact` or `krylov`. capped: whether the tolerance was missed. cached: whether the factors were read from the
    cache. seconds: reading and the residual included. gib: of residual and factors, all ranks' parts together.
    owner: the rank that did it.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    captured: float
    excess: float
    way: str
    iterations: int
    capped: bool
    cached: bool
    seconds: float
    gib: float
    owner: int

    @classmethod
    def of(
        cls, target: Target, found: Decomposition, owner: int, seconds: float, tensors: Sequence[Tensor]
    ) -> "LayerReport":
        """The record of a layer that was just decomposed, or whose decomposition was just read."""
        return cls(
            name=target.name,
            shape=(target.out_features, target.in_features),
            rank=target.rank,
            cached=isinstance(found, CachedDecomposition),
            seconds=seconds,
            gib=sum(tensor.nbytes for tensor in tensors) / 2**30,
            owner=owner,
            **asdict(found.accuracy),
        )


def table(reports: Sequence[LayerReport]) -> str:
    """One line a kind of layer (the last part of its name)."""
    kinds: dict[str, list[LayerReport]] = defaultdict(list)
    for report in reports:
        kinds[report.name.rpartition(".")[2]].append(report)
    columns = ("captured", 9), ("excess", 9), ("seconds", 8), ("GiB", 7)
    heads = " ".join(f"{name:>{width}}" for name, width in columns)
    lines = [f"  {'layer kind':<12} {'count':>5} {'shape':>13} {'r':>4} {heads}  way"]
    for kind, some in kinds.items():
        shapes = {f"{r.shape[0]} x {r.shape[1]}" for r in some}
        ranks = {r.rank for r in some}
        ways = sorted({r.way + (" (cached)" if r.cached else "") for r in some})
        lines.append(
            f"  {kind:<12} {len(some):>5} {_one(shapes):>13} {_one(ranks):>4} "
            f"{sum(r.captured for r in some) / len(some):>9.2%} {max(r.excess for r in some):>9.1e} "
            f"{sum(r.seconds for r in some):>8.1f} {sum(r.gib for r in some):>7.3f}  {', '.join(ways)}"
        )
    missed = [r.name for r in reports if r.capped]
    if missed:
        lines.append(f"  {len(missed)} layers ended above the tolerance, first {missed[0]}")
    return "\n".join(lines)


def as_json(reports: Sequence[LayerReport], *, seconds: float, world_size: int, peak_gib: Sequence[float]) -> dict:
    """All records and the totals; `peak_gib`: largest resident memory of each rank."""
    return {
        "seconds": seconds,
        "world_size": world_size,
        "seconds_by_rank": [sum(r.seconds for r in reports if r.owner == rank) for rank in range(world_size)],
        "peak_resident_gib_by_rank": list(peak_gib),
        "from_cache": sum(r.cached for r in reports),
        "layers": [asdict(report) for report in reports],
    }


def _one(values: set) -> str:
    return str(next(iter(values))) if len(values) == 1 else "various"
