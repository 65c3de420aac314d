"""What a user of PEFT says about a SORSA adapter."""

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig, PeftType

from sorsa_ds.config import adapter_settings, method_settings
from sorsa_ds.peft.peft_type import NAME

Names = list[str] | str | None

_ADAPTER, _OURS = adapter_settings.AdapterConfig(), method_settings.SorsaConfig()
"""The trainer's settings, whose defaults hold here too."""


@dataclass
class SorsaConfig(PeftConfig):
    """The configuration of a SORSA adapter. Fields that PEFT's other methods have too mean what they mean there.

    Raises:
        ValueError: a value is out of its range, or two fields do not go together.
    """

    r: int = field(
        default=_ADAPTER.rank,
        metadata={"help": "Singular triplets that are trained in each linear; at most min(out, in) of any of them."},
    )
    target_modules: Names = field(
        default=None,
        metadata={
            "help": "Linears to adapt: `all-linear` (all but the output head), names or name suffixes, or a regular "
            "expression. None: PEFT's choice for the architecture, where it knows one."
        },
    )
    exclude_modules: Names = field(
        default=None, metadata={"help": "Names, suffixes or a regular expression of linears that are left as they are."}
    )
    sorsa_alpha: float | None = field(
        default=_ADAPTER.alpha,
        metadata={"help": "The product U diag(s) V^T is scaled by sorsa_alpha / r. None: by 1, as in the papers."},
    )
    use_rslora: bool = field(
        default=_ADAPTER.rslora, metadata={"help": "Scale by sorsa_alpha / sqrt(r) instead. It needs sorsa_alpha."}
    )
    sorsa_dropout: float = field(
        default=_ADAPTER.dropout, metadata={"help": "Dropout on the input of the trained product, in training only."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks of single linears: name, suffix or regular expression -> rank."}
    )
    triplets: Literal["leading", "trailing", "window", "null_space"] = field(
        default=_OURS.triplets,
        metadata={
            "help": "Which singular triplets of each weight are trained: those of the largest singular values (the "
            "papers), of the smallest, or r of them from number window_start on; these two are decomposed exactly. "
            "`null_space`: those of the weight on the input directions that the base model uses least."
        },
    )
    directions: str | None = field(
        default=_OURS.directions,
        metadata={
            "help": "`triplets='null_space'`: the file of input directions that `sorsa calibrate` wrote. A saved "
            "adapter does not need it."
        },
    )
    window_start: int | None = field(
        default=_OURS.window_start,
        metadata={"help": "Number of the first triplet that is trained, the largest being 0. None: the middle ones."},
    )
    svd: Literal["randomized", "exact"] = field(
        default=_OURS.svd,
        metadata={
            "help": "`randomized`: block Krylov iteration to svd_tolerance, seeded by the layer's name, or the exact "
            "decomposition where that is faster. `exact`: always the exact one."
        },
    )
    svd_tolerance: float = field(
        default=_OURS.svd_tolerance,
        metadata={
            "help": "The iteration ends when the energy of the residual is at most this fraction above the least."
        },
    )
    svd_max_iterations: int = field(
        default=_OURS.svd_max_iterations, metadata={"help": "Largest number of iterations of one decomposition."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "False: begin with random factors in place of the singular triplets. For tests only."},
    )
    bias: str = field(
        default="none",
        metadata={"help": "Which biases are trained: `none`, `all`, or `sorsa_only`: the adapted linears'."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained whole and saved with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the layers to adapt, where target_modules is a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "What layers are called in this model, where it is nothing common."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        self.factors_follow = False
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's other methods do
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        for ranks in (self.r, *self.rank_pattern.values()):
            if ranks < 1:
                raise ValueError(f"`r` should be a positive integer value but the value passed is {ranks}")
        if not 0 <= self.sorsa_dropout < 1:
            raise ValueError(f"`sorsa_dropout` should be in 0 .. 1, but the value passed is {self.sorsa_dropout}")
        if self.sorsa_alpha is not None and not self.sorsa_alpha > 0:
            raise ValueError(f"`sorsa_alpha` should be positive or None, but the value passed is {self.sorsa_alpha}")
        if self.use_rslora and self.sorsa_alpha is None:
            raise ValueError("`use_rslora` scales by sorsa_alpha / sqrt(r): `sorsa_alpha` should be set")
        if self.triplets not in ("leading", "trailing", "window", "null_space"):
            raise ValueError(
                f"`triplets` should be 'leading', 'trailing', 'window' or 'null_space', but the value passed is "
                f"{self.triplets!r}"
            )
        if self.directions is not None:
            self.directions = str(self.directions)  # a path cannot be saved
        if (self.triplets == "null_space") != (self.directions is not None):
            raise ValueError("`triplets='null_space'` and `directions`, the file that it begins from, go together")
        if self.window_start is not None and (self.triplets != "window" or self.window_start < 0):
            raise ValueError("`window_start` should be None or, with `triplets='window'`, a number from 0 on")
        if self.svd not in ("randomized", "exact"):
            raise ValueError(f"`svd` should be 'randomized' or 'exact', but the value passed is {self.svd!r}")
        if self.bias not in ("none", "all", "sorsa_only"):
            raise ValueError(f"`bias` should be 'none', 'all' or 'sorsa_only', but the value passed is {self.bias!r}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> "SorsaConfig":
        """Read the configuration of a saved adapter, for `peft.PeftModel.from_pretrained`, which calls this.

        Layers that are made by such a configuration wait for the saved factors, and decompose nothing. `PeftConfig`'s
        method of this name reads the same file for an adapter that begins anew.
        """
        config = super().from_pretrained(*args, **options)
        config.factors_follow = True
        return config

    def decomposition(self) -> method_settings.SorsaConfig:
        """The same choice of triplets, and of how they are found, as settings of the trainer."""
        names = ("triplets", "directions", "window_start", "svd", "svd_tolerance", "svd_max_iterations")
        return method_settings.SorsaConfig(**{name: getattr(self, name) for name in names})

    def scale(self, rank: int) -> float:
        """The factor on U diag(s) V^T of a linear with this rank."""
        return adapter_settings.adapter_scale(self.sorsa_alpha, rank, self.use_rslora)
