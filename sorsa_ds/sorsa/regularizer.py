"""The orthonormal regulariser and its closed-form gradient (SORSA, eq. 9 and Definition 4.1).

Everything is a function of the Gram matrices G = X^T X of the factors X (U or V, one of them (P, R): P rows, R rank)
and E = G - I:

    norm      L = ||E||_F       dL/dX = X F,  F = 2 E / ||E||_F
    squared   L = ||E||_F^2     dL/dX = X F,  F = 4 E

Where ||E||_F is at the level of rounding (`rounding_level`), X counts as orthonormal and F is 0 in both forms. That is
so at step 0 and after a re-orthonormalisation. Taken literally, the norm form would give its full gradient of norm 2
there, in a direction that consists of rounding errors: Adam, which divides by the gradient's size, would follow it, and
the same settings would train differently on another ZeRO stage or number of ranks. L itself is reported as it is.

A Gram matrix is a sum over rows, so processes that hold different rows need to sum only (R, R) numbers.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from sorsa_ds.config.declare import Amount, NonNegativeInt
from sorsa_ds.config.method_settings import RegularizerConfig, relative_gamma

ROUNDING = 32 * 2.0**-24
"""The largest ||X^T X - I||_F / sqrt(R) of a factor X that counts as orthonormal to the rounding of fp32 numbers.

Rounding orthonormal columns to fp32 leaves at most 2 x 2^-24, and the fp32 QR decompositions of the initialisation left
5 x 2^-24 in a matrix of 4,096 rows and 11 x 2^-24 in one of 28,672 (LAPACK, measured). A step of AdamW at a learning
rate of 1e-6 leaves more than this level. The masters are always fp32, whatever precision the model computes in.
"""

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

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    form: Form
    reduction: Reduction
    coefficient: Amount
    reorthonormalize: NonNegativeInt = 0

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
    resolved = _resolved(config)
    gamma = resolved["gamma"]
    if isinstance(gamma, str):
        coefficient = relative_gamma(gamma)
    else:
        coefficient = gamma / learning_rate if gamma else 0.0
    divide = resolved["divide_by_accumulation"]
    if divide is not False:
        coefficient /= accumulation_steps if divide is True else divide
    return Regularizer(resolved["form"], resolved["reduction"], coefficient, config.reorthonormalize)


def follows_rate(config: RegularizerConfig) -> bool:
    """Whether gamma / eta_d is the same whatever eta_d is: gamma is relative to it, or 0."""
    gamma = _resolved(config)["gamma"]
    return isinstance(gamma, str) or not gamma


def _resolved(config: RegularizerConfig) -> dict[str, Any]:
    """The fields that a preset has values for, each as it is set or as the preset says."""
    return {
        key: value if (own := getattr(config, key)) is None else own for key, value in _PRESETS[config.preset].items()
    }


def penalty(error: Tensor, form: Form) -> Tensor:
    """The penalty L of each matrix, (...), from E = X^T X - I (..., R, R)."""
    norm = torch.linalg.matrix_norm(error)
    return norm if form == "norm" else norm.square()


def rounding_level(rank: int) -> float:
    """The ||E||_F up to which an (R, R) matrix E = X^T X - I counts as zero, for R = rank."""
    return ROUNDING * math.sqrt(rank)


def gradient_factor(error: Tensor, form: Form) -> Tensor:
    """The factor F (..., R, R) with dL/dX = X F, from E = X^T X - I (..., R, R); 0 where E is rounding."""
    norm = torch.linalg.matrix_norm(error)[..., None, None]
    factor = 4.0 * error if form == "squared" else 2.0 * error / norm
    return torch.where(norm > rounding_level(error.shape[-1]), factor, torch.zeros_like(error))
