"""The two thin matrices with which a layer computes: left = scale * U diag(s) and right = V, in the compute dtype.

The principal part of a weight is left right^T (SORSA, eq. 8). With s in one of the two, neither the forward nor the
backward pass has a product of its own for it. U, s and V stay what is trained: from the gradients of left and right
follow theirs,

    grad U = scale * (grad left) diag(s),   grad s = scale * sum over rows of U * (grad left),   grad V = grad right

Shapes, used as suffixes of tensor names, each perhaps behind E experts: M out_features, N in_features, R rank; T tokens
(all leading dimensions of the input).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sides:
    """left (..., M, R) and right (..., N, R) of a layer, each rounded once."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, U: Tensor, s: Tensor, V: Tensor, scale: float, dtype: torch.dtype) -> "Sides":
        """The sides of U (..., M, R), s (..., R) and V (..., N, R) in a dtype."""
        left = torch.mul(U, scaled(s, scale), out=torch.empty_like(U, dtype=dtype))
        return cls(left, V.to(dtype))

    @classmethod
    def taken(
        cls,
        left: Tensor | None,
        right: Tensor | None,
        U: Tensor,
        s: Tensor,
        V: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> "Sides":
        """The kept sides `left` and `right` (see `KeptSides`), or, where none are kept, sides made now."""
        return cls.of(U, s, V, scale, dtype) if left is None else cls(left, V if right is None else right)


class SideLayer(Protocol):
    """A layer whose sides can be kept.

    kept_sides: None outside of the context `keep_sides`.
    """

    scale: float
    kept_sides: "KeptSides | None"

    @property
    def U(self) -> Tensor: ...
    @property
    def s(self) -> Tensor: ...
    @property
    def V(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class KeptSides:
    """The sides of one layer in one dtype, as tensors that a compiled block takes as its inputs.

    left: the left side (..., M, R) (see `Sides`).
    right: the right side (..., N, R); None where it is V itself, which has that dtype already.
    rates: (blocks, 1, R), with which the gradients of left and right, one behind the other, are multiplied block of
        rows by block of rows, to become those of U and V. None for experts.
    """

    left: Tensor
    right: Tensor | None
    rates: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, layer: SideLayer, dtype: torch.dtype) -> "KeptSides":
        """The layer's sides in a dtype."""
        sides = Sides.of(layer.U, layer.s, layer.V, layer.scale, dtype)
        right = None if sides.right is layer.V else sides.right
        if layer.U.ndim > 2:
            return cls(sides.left, right, None)
        m, n = len(layer.U), len(layer.V)
        block, s_1R = gcd(m, n), scaled(layer.s, layer.scale)
        rates = s_1R.new_ones((m + n) // block, 1, s_1R.shape[1])
        rates[: m // block] = s_1R
        return cls(sides.left, right, rates)

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """left, right and rates."""
        return self.left, self.right, self.rates


@contextmanager
def keep_sides(layers: Iterable[SideLayer], dtype: torch.dtype | None = None) -> Iterator[None]:
    """Context in which layers have their sides at hand, where they compute in the dtype of these.

    Inside of it nobody may change U, s or V, or free their storage as ZeRO-3 does. What is kept takes the memory of U
    and V in that dtype, until the context ends.

    Args:
        dtype: the dtype of the matrix products; None: the dtype of each layer's U.
    """
    layers = list(layers)
    try:
        for layer in layers:
            layer.kept_sides = KeptSides.of(layer, dtype or layer.U.dtype)
        yield
    finally:
        for layer in layers:
            layer.kept_sides = None


def at_hand(layer: SideLayer, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The tensors of the layer's kept sides; three times None where none are kept in this dtype."""
    kept = layer.kept_sides
    return (None, None, None) if kept is None or kept.left.dtype != dtype else kept.tensors


def kept_bytes(matrices: int, m: int, n: int, rank: int, compute: torch.dtype, held: torch.dtype) -> int:
    """Bytes of a layer's kept sides: of left, of right where it is not V itself, and of the rates."""
    rates = (m + n) // gcd(m, n) * held.itemsize if matrices == 1 else 0
    return rank * (matrices * (m * compute.itemsize + (n * compute.itemsize if compute != held else 0)) + rates)


def scaled(s: Tensor, scale: float) -> Tensor:
    """scale * s (..., 1, R), to be multiplied with the rows of U."""
    rates = s.unsqueeze(-2)
    return rates if scale == 1.0 else scale * rates


def left_gradients(grad_left: Tensor, U: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of U and s, in their dtypes, from that of left (..., M, R)."""
    grad_U = torch.mul(grad_left, scaled(s, scale), out=torch.empty_like(U))
    return grad_U, scale_gradient(grad_left, U, s, scale)


def scale_gradient(grad_left: Tensor, U: Tensor, s: Tensor, scale: float) -> Tensor:
    """The gradient of s from that of left."""
    wide = s.dtype if s.dtype == torch.float64 else torch.float32
    grad_s = (U * grad_left).sum(-2, dtype=wide)
    return (grad_s if scale == 1.0 else scale * grad_s).to(s.dtype)


def joined_gradients(
    g_TM: Tensor, z_TR: Tensor, x_TN: Tensor, h_TR: Tensor, U_MR: Tensor, s_R: Tensor, scale: float, rates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of U, s and V from the operands of those of left, g^T z, and of right, x^T h.

    Both products lie in one buffer, so a single kernel scales them and widens them to the factors' dtype.

    Args:
        rates: factors (blocks, 1, R) on the gradients of left and right, block by block (see `KeptSides`).
    """
    sizes = [g_TM.shape[1], x_TN.shape[1]]
    both = g_TM.new_empty(sum(sizes), z_TR.shape[1])
    grad_left, grad_right = both.split(sizes)
    torch.mm(g_TM.t(), z_TR, out=grad_left)
    torch.mm(x_TN.t(), h_TR, out=grad_right)
    by_block = both.view(len(rates), -1, both.shape[1])
    grad_U, grad_V = torch.mul(by_block, rates, out=U_MR.new_empty(by_block.shape)).view_as(both).split(sizes)
    return grad_U, scale_gradient(grad_left, U_MR, s_R, scale), grad_V
