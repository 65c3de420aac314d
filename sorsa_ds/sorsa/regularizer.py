"""The orthonormal regulariser and its closed-form gradient (SORSA, eq. 9 and Definition 4.1).

Everything is a function of the Gram matrices G = X^T X of the factors X (U or V, one of them (P, R): P rows, R rank)
and E = G - I:

    norm      L = ||E||_F       dL/dX = X F,  F = 2 E / ||E||_F   (0 where E = 0)
    squared   L = ||E||_F^2     dL/dX = X F,  F = 4 E

At step 0 the factors are orthonormal to rounding. The gradient of the norm form then has the direction of the rounding
errors and norm 2 per matrix, however small the errors are. The definition says so; it is small against the loss's
gradient, and no longer matters after the first update.

A Gram matrix is a sum over rows, so processes that hold different rows need to sum only (R, R) numbers.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sorsa_ds.config.method_settings import RegularizerConfig, relative_gamma

Form = Literal["norm", "squared"]
Reduction = Literal["mean", "sum"]

_PRESETS: dict[str, dict[str, Any]] = {
    "default": {"form": "norm", "reduction": "mean", "gamma": "0.2*lr", "divide_by_accumulation": False},
    "reference": {"form": "norm", "reduction": "mean", "gamma": 4e-4, "divide_by_accumulation": True},
    "paper": {"form": "norm", "reduction": "sum", "gamma": 4e-4, "divide_by_accumulation": False},
}
"""The values of `RegularizerConfig` that each preset stands for."""


@dataclass(frozen=True, slots=True)
class Regularizer:
    """The regulariser with all its settings resolved.

    coefficient: gamma / eta_d, the factor on grad L_reg (eq. 11).
    reorthonormalize: steps from one re-orthonormalisation (`sorsa_ds.engine.reorthonormalize`) to the next; 0: none.
    """

    form: Form
    reduction: Reduction
    coefficient: float
    reorthonormalize: int = 0

    def rhythm(self) -> str:
        """A clause that says how often U and V are made orthonormal; empty where they never are."""
        every = self.reorthonormalize
        return f"; U and V made orthonormal every {f'{every} steps' if every > 1 else 'step'}" if every else ""


def resolve_regularizer(config: RegularizerConfig, *, learning_rate: float, accumulation_steps: int) -> Regularizer:
    """Take unset fields from the preset, and turn gamma into the coefficient gamma / eta_d.

    Args:
        learning_rate: eta_d, the maximum of the learning rate schedule.
        accumulation_steps: micro-batches per optimizer step. They matter only where `divide_by_accumulation` is true.
    """
    resolved = {
        key: value if (own := getattr(config, key)) is None else own for key, value in _PRESETS[config.preset].items()
    }
    gamma = resolved["gamma"]
    coefficient = relative_gamma(gamma) if isinstance(gamma, str) else gamma / learning_rate
    divide = resolved["divide_by_accumulation"]
    if divide is not False:
        coefficient /= accumulation_steps if divide is True else divide
    return Regularizer(resolved["form"], resolved["reduction"], coefficient, config.reorthonormalize)


def penalty(error: Tensor, form: Form) -> Tensor:
    """The penalty L of each matrix, (...), from E = X^T X - I (..., R, R)."""
    norm = torch.linalg.matrix_norm(error)
    return norm if form == "norm" else norm.square()


def gradient_factor(error: Tensor, form: Form) -> Tensor:
    """The factor F (..., R, R) with dL/dX = X F, from E = X^T X - I (..., R, R)."""
    if form == "squared":
        return 4.0 * error
    norm = torch.linalg.matrix_norm(error)[..., None, None]
    return torch.where(norm > 0, 2.0 * error / norm, torch.zeros_like(error))
