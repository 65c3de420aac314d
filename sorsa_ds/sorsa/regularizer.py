"""The orthonormal regulariser and its closed-form gradient (SORSA, eq. 9 and Definition 4.1).

Everything is a function of the Gram matrices G = X^T X of the factors X (U or V, one of them (P, R): P rows, R rank)
and E = G - I:

    norm      L = ||E||_F       dL/dX = X F,  F = 2 E / ||E||_F   (0 where E = 0)
    squared   L = ||E||_F^2     dL/dX = X F,  F = 4 E

At step 0 the factors are orthonormal to rounding, and the norm form's gradient is then the unit direction of that
rounding noise: small against the loss's gradient, and gone after the first update, but it is the definition.

A Gram matrix is a sum over rows, so ranks that hold different rows need to sum only (R, R) numbers.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sorsa_ds.config.schema import RegularizerConfig, relative_gamma

Form = Literal["norm", "squared"]
Reduction = Literal["mean", "sum"]

_PRESETS = {
    "default": {"form": "norm", "reduction": "mean", "gamma": "0.2*lr", "divide_by_accumulation": False},
    "reference": {"form": "norm", "reduction": "mean", "gamma": 4e-4, "divide_by_accumulation": True},
    "paper": {"form": "norm", "reduction": "sum", "gamma": 4e-4, "divide_by_accumulation": False},
}


@dataclass(frozen=True, slots=True)
class Regularizer:
    """The regulariser with all choices made. `coefficient` is gamma / eta_d: what multiplies grad L_reg (eq. 11).

    reorthonormalize: steps from one re-orthonormalisation (`sorsa_ds.engine.reorthonormalize`) to the next; 0: none.
    """

    form: Form
    reduction: Reduction
    coefficient: float
    reorthonormalize: int = 0

    def rhythm(self) -> str:
        """A clause on the re-orthonormalisation; empty without it."""
        every = self.reorthonormalize
        return f"; U and V made orthonormal every {f'{every} steps' if every > 1 else 'step'}" if every else ""


def resolve(config: RegularizerConfig, *, learning_rate: float, accumulation_steps: int) -> Regularizer:
    """Fill unset fields from the preset and turn gamma into the coefficient gamma / eta_d.

    Args:
        learning_rate: eta_d, the scheduler's maximum.
        accumulation_steps: micro-batches of one optimizer step; only `reference` looks at it.
    """
    chosen = {
        key: value if (own := getattr(config, key)) is None else own for key, value in _PRESETS[config.preset].items()
    }
    gamma = chosen["gamma"]
    coefficient = relative_gamma(gamma) if isinstance(gamma, str) else gamma / learning_rate
    if chosen["divide_by_accumulation"]:
        coefficient /= accumulation_steps
    return Regularizer(chosen["form"], chosen["reduction"], coefficient, config.reorthonormalize)


def penalty(error: Tensor, form: Form) -> Tensor:
    """L of each matrix, from E (..., R, R): shape (...)."""
    norm = torch.linalg.matrix_norm(error)
    return norm if form == "norm" else norm.square()


def gradient_factor(error: Tensor, form: Form) -> Tensor:
    """F (..., R, R) with dL/dX = X F, from E (..., R, R)."""
    if form == "squared":
        return 4.0 * error
    norm = torch.linalg.matrix_norm(error)[..., None, None]
    return torch.where(norm > 0, 2.0 * error / norm, torch.zeros_like(error))
