"""The regulariser on fp32 masters that ZeRO has partitioned: its value and gradient from the Gram matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sorsa_ds.engine.grams import Alike, Rows, ShardedGrams
from sorsa_ds.engine.masters import Fragment
from sorsa_ds.runtime.numerics import full_fp32_products
from sorsa_ds.sorsa.regularizer import Regularizer, gradient_factor, penalty


class ShardedRegularizer:
    """Computes L_reg once per step, and adds (gamma / eta_d) grad L_reg to the masters' gradients.

    Args:
        regularizer: the form, reduction and coefficient.
        grams: Gram matrices of the factors that are regularised.
    """

    def __init__(self, regularizer: Regularizer, grams: ShardedGrams):
        self.regularizer = regularizer
        self._grams = grams
        self._of_masters: dict[tuple[int, ...], tuple[list[Alike], list[Rows]]] = {}
        self._factors: list[Tensor] = []

    @torch.no_grad()
    def prepare(self) -> tuple[Tensor, Tensor]:
        """Compute L_reg, and keep what `add_to` needs of its gradient. A collective call.

        Returns:
            L_reg, and the Frobenius norm of the term (gamma / eta_d) grad L_reg that will be added; 0-D float64.
        """
        self._grams.take()
        reg = self.regularizer
        weight = 1.0 / len(self._grams.grams) if reg.reduction == "mean" else 1.0
        value = torch.zeros((), dtype=torch.float64, device=self._grams.device)
        square = torch.zeros_like(value)
        self._factors = []
        for gram in self._grams.batches:
            error = gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            factor = reg.coefficient * weight * gradient_factor(error, reg.form)
            value += weight * penalty(error, reg.form).sum()
            square += ((factor @ gram) * factor).sum()  # ||X F||^2 = tr(F X^T X F) for a symmetric F
            self._factors.append(factor.float())
        return value, square.clamp_min(0).sqrt()

    @torch.no_grad()
    def add_to(self, masters: Sequence[Tensor]) -> None:
        """Add (gamma / eta_d) grad L_reg to the `.grad` of masters, for all fragments that lie in them."""
        groups, cut = self._parts(masters)
        with full_fp32_products():
            for group in groups:
                rows = group.rows(Fragment.values).to(self._grams.device)
                terms = group.divide(rows @ self._factors[group.batch][group.places])
                gradients = [part.rows(part.fragment.gradient()) for part in group.parts]
                torch._foreach_add_(gradients, [term.to(one) for term, one in zip(terms, gradients, strict=True)])
            for part in cut:
                gradient = part.fragment.gradient()
                factors = self._grams.within(self._factors, part.numbers)
                for span, term in part.cut_times(self._grams.cut_rows, factors):
                    gradient[span] += term.to(gradient)

    def _parts(self, masters: Sequence[Tensor]) -> tuple[list[Alike], list[Rows]]:
        """The fragments that lie in masters, in groups, and those of them that have pieces of cut rows."""
        key = tuple(map(id, masters))
        if key not in self._of_masters:
            parts = [part for part in self._grams.fragments if id(part.fragment.master) in key]
            self._of_masters[key] = self._grams.group(parts), [part for part in parts if part.pieces]
        return self._of_masters[key]
