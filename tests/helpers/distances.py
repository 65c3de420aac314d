"""How far what was computed is from what was expected."""

from torch import Tensor


def relative(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius distance of a from b, in the dtype that they have."""
    return ((a - b).norm() / b.norm()).item()
