"""The regulariser on fp32 masters that ZeRO has partitioned: its value and gradient from the Gram matrices."""

import torch
from torch import Tensor

from sorsa_ds.engine.grams import Rows, ShardedGrams
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
        self._by_master: dict[int, list[Rows]] = {}
        for part in grams.fragments:
            self._by_master.setdefault(id(part.fragment.master), []).append(part)
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
    def add_to(self, master: Tensor) -> None:
        """Add (gamma / eta_d) grad L_reg to `master.grad`, for all fragments that lie in this master."""
        with full_fp32_products():
            for part in self._by_master.get(id(master), ()):
                factors, gradient = self._grams.within(self._factors, part.numbers), part.fragment.gradient()
                for span, term in part.times(part.fragment.values(), self._grams.cut_rows, factors):
                    gradient[span] += term.to(gradient)
