"""The settings of SORSA and of the methods that it is compared with. A field's docstring is its help text."""

from typing import Annotated, Any, Literal

from pydantic import Field

from sorsa_ds.config.declare import (
    MOST,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Rank,
    Rounds,
    settings,
)
from sorsa_ds.config.renamed import RENAMED

MethodName = Literal["sorsa", "lora", "pissa", "adalora", "dora", "olora", "full", "partial", "galore"]


def relative_gamma(text: str) -> float:
    """The factor of a gamma that is given relative to the learning rate, such as 0.2 from `0.2*lr`.

    Raises:
        ValueError: the text has another form, or the factor is negative or larger than any setting may be.
    """
    number, star, rate = text.replace(" ", "").partition("*")
    try:
        factor = float(number)
    except ValueError:
        factor = -1.0
    if star != "*" or rate != "lr" or not 0 <= factor <= MOST:
        raise ValueError(
            f"regularizer.gamma: {text!r} is neither a number from 0 to {MOST:,} nor `<number>*lr`, as in `0.2*lr`"
        )
    return factor


@settings
class SorsaConfig:
    """Which part of the weights SORSA trains, how it is found, and how fast its columns learn."""

    triplets: Literal["leading", "trailing", "window", "null_space"] = "leading"
    """Which singular triplets of each weight are trained: those of the largest singular values (the papers), those of
    the smallest, or `rank` of them from number `window_start` on; these two take an exact decomposition. `null_space`:
    those of the weight on the `rank` input directions that the base model uses least, which `directions` names."""

    directions: Name | None = None
    """`triplets=null_space`: the file of input directions that `sorsa calibrate` has written for the base model."""

    window_start: NonNegativeInt | None = None
    """`triplets=window`: number of the first triplet that is trained, the largest being 0. Unset: the middle ones."""

    column_rates: Literal["equal", "inverse_sqrt", "inverse"] = "equal"
    """What a step of a column of U or V is divided by. `equal`: by nothing, so that the product U diag(s) V^T moves in
    proportion to s. `inverse`: by the column's singular value s at the beginning, so that the product moves as far in
    every column. `inverse_sqrt`: by sqrt(s), as if U sqrt(s) and V sqrt(s) were trained, which are PiSSA's factors."""

    s_lr_ratio: PositiveFloat = 1.0
    """How many times `train.learning_rate` the singular values s learn with."""

    s_space: Literal["linear", "log"] = "linear"
    """`log`: the logarithms of s are trained, so that a step changes s by a factor and never its sign."""

    svd: Literal["randomized", "exact"] = "randomized"
    """`randomized`: block Krylov iteration to `svd_tolerance`, seeded by the layer's name, or the exact decomposition
    where that is faster. `exact`: always the exact decomposition."""

    svd_tolerance: PositiveFloat = 1e-2
    """The iteration ends when the energy of W_r exceeds the smallest possible one by at most this fraction."""

    svd_max_iterations: Rounds = 16
    """Largest number of iterations. Layers that reach it before the tolerance are named."""

    svd_cache: Name = "auto"
    """Folder that keeps decompositions for later runs, which may use another number of ranks. `auto`: the user's cache
    folder (SORSA_CACHE). `off`: keep none. A layer takes about 4 rank (out + in) bytes."""

    def __new__(cls, *args: Any, **given: Any) -> "SorsaConfig":
        """Refuse by name what an earlier version had here, for programs that were written for it.

        Raises:
            ValueError: naming the settings, and where they are now.
        """
        if moved := [name for name in given if f"sorsa.{name}" in RENAMED]:
            now = ", ".join(f"{name}=..." for name in moved)
            raise ValueError(
                f"SorsaConfig has no {', '.join(moved)}: all methods share that now, as sorsa_ds.AdapterConfig({now})"
            )
        return object.__new__(cls)

    def __post_init__(self) -> None:
        if self.window_start is not None and self.triplets != "window":
            raise ValueError(
                f"sorsa.window_start={self.window_start} goes with sorsa.triplets=window, not {self.triplets}"
            )
        if self.triplets == "null_space" and self.directions is None:
            raise ValueError(
                "sorsa.triplets=null_space needs sorsa.directions, the file that `sorsa calibrate` writes for the base "
                "model: sorsa calibrate --model MODEL --output FILE"
            )
        if self.directions is not None and self.triplets != "null_space":
            raise ValueError(f"sorsa.directions goes with sorsa.triplets=null_space, not {self.triplets}")

    @property
    def column_power(self) -> float:
        """p, where the step of a column of U or V is divided by s^p."""
        return {"equal": 0.0, "inverse_sqrt": 0.5, "inverse": 1.0}[self.column_rates]

    @property
    def has_own_rates(self) -> bool:
        """Whether some columns or singular values learn otherwise than at `train.learning_rate`."""
        return (self.column_rates, self.s_lr_ratio, self.s_space) != ("equal", 1.0, "linear")

    def first_triplet(self, out_features: int, in_features: int, rank: int) -> int:
        """Number of the first triplet that is trained of a weight (out, in), counted from the largest, which is 0."""
        free = min(out_features, in_features) - rank
        if self.triplets == "leading":
            return 0
        if self.triplets == "trailing":
            return free
        return free // 2 if self.window_start is None else self.window_start


@settings
class BaselineConfig:
    """Settings that only some of the other methods have. What all methods share is in `adapter`."""

    loraplus_lr_ratio: PositiveFloat | None = None
    """LoRA+: how many times `train.learning_rate` the second factor B of LoRA, PiSSA, OLoRA and DoRA learns with, by
    PEFT's grouping of parameters. Unset: once."""

    pissa_iterations: Annotated[int, Field(ge=0, le=1000)] = 0
    """PiSSA: iterations of PEFT's fast decomposition (`pissa_niter_4` has 4). 0: the exact decomposition."""

    adalora_init_rank: Rank | None = None
    """AdaLoRA: rank of every linear layer at the beginning. Unset: adapter.rank."""

    adalora_target_rank: Rank | None = None
    """AdaLoRA: mean rank at the end. Unset: adapter.rank, as in the papers, where the rank is therefore not reduced."""

    adalora_t_init: NonNegativeInt | None = None
    """AdaLoRA: steps before the ranks are first reduced. Unset: a tenth of all steps."""

    adalora_t_final: NonNegativeInt | None = None
    """AdaLoRA: steps at the end in which the ranks stay as they are. Unset: half of all steps."""

    adalora_delta_t: PositiveInt = 10
    """AdaLoRA: steps between two allocations of ranks."""

    adalora_beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """AdaLoRA: decay rate of the averaged importance."""

    adalora_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """AdaLoRA: decay rate of the averaged uncertainty of the importance."""

    adalora_orthogonal_weight: NonNegativeFloat = 0.5
    """AdaLoRA: coefficient of the orthogonality term that PEFT adds to the loss."""

    galore_rank: Rank = 128
    """GaLore: rank to which the gradient of each target's weight is projected."""

    galore_update_gap: PositiveInt = 200
    """GaLore: steps after which the projection is made anew from the gradient."""

    galore_scale: PositiveFloat = 0.25
    """GaLore: factor of the projected update."""


@settings
class ResidualConfig:
    """How the frozen residual W_r is stored. U, s and V are trained in full precision with any storage."""

    storage: Literal["auto", "fp32", "bf16", "nf4", "nf4_double", "int8"] = "auto"
    """Number format of W_r. With blocks of 64 weights, `nf4` takes 4.5 bits per weight (4 bits, and an fp32 scale per
    block), `nf4_double` 4.13 (the scales take 8 bits), `int8` 8.5. `auto`: fp32 or bf16, as `train.precision` says."""

    block_size: Literal[64, 128, 256, 512, 1024] = 64
    """Number of weights that share a scale, where the storage is quantised."""

    iterations: Rounds = 1
    """1: decompose the weight W, then quantise W_r. More: decompose again what quantising left out, W - Q, and keep
    the best of so many rounds. Each round costs one decomposition."""

    def __post_init__(self) -> None:
        if self.iterations > 1 and self.storage in ("auto", "fp32", "bf16"):
            raise ValueError(
                f"residual.iterations: {self.iterations} rounds need a quantised residual.storage, not {self.storage}"
            )


@settings
class RegularizerConfig:
    """The orthonormal regulariser L_reg and its strength gamma / eta_d (SORSA, eq. 9 to 11).

    Fields left unset take the preset's value.
    """

    preset: Literal["default", "reference", "paper"] = "default"
    """`default`: form norm, reduction mean, gamma 0.2*lr. This is the effective strength of the published runs, made
    independent of gradient accumulation. `reference`: what the published code computes: norm, mean, gamma 4e-4,
    divided by this run's accumulation steps unless `divide_by_accumulation` says another number. `paper`: eq. 9 and 11
    as printed: norm, sum, gamma 4e-4. That is thousands of times stronger and drowns the training loss."""

    form: Literal["norm", "squared"] | None = None
    """`norm`: ||U^T U - I||_F + ||V^T V - I||_F. `squared`: the sum of the squares of these norms."""

    reduction: Literal["mean", "sum"] | None = None
    """Whether L_reg is the mean or the sum over the 2 L matrices U and V of L layers."""

    gamma: NonNegativeFloat | str | None = None
    """Strength of the regulariser: a number gamma (its gradient is scaled by gamma / eta_d), or one relative to the
    learning rate, such as `0.2*lr`. 0: no regulariser."""

    divide_by_accumulation: bool | PositiveInt | None = None
    """Divide the coefficient by a number of gradient accumulation steps, as the published code does without saying so.
    `true`: by this run's, so that the strength depends on how the batch is split. A number: by so many, however this
    run splits it; 64 with gamma 4e-4 is the published strength on any number of GPUs."""

    reorthonormalize: NonNegativeInt = 0
    """Optimizer steps after which U and V are made orthonormal again, to rounding, without changing U diag(s) V^T. It
    works beside L_reg, or in its place with gamma 0. 0: never."""

    def __post_init__(self) -> None:
        if isinstance(self.gamma, str):
            relative_gamma(self.gamma)
