"""What is adapted, and by how much: the settings that all methods share. A field's docstring is its help text."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from sorsa_ds.config.block_ranges import check_blocks
from sorsa_ds.config.declare import Fraction, PositiveFloat, Rank, settings

Block = Annotated[int, Field(ge=0, le=9999)] | Annotated[str, AfterValidator(check_blocks)]
"""The number of a block of the model, or text for several, such as `8-15`."""


def adapter_scale(alpha: float | None, rank: int, rslora: bool) -> float:
    """alpha / rank, with rsLoRA alpha / sqrt(rank), or 1 where alpha is unset."""
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if rslora else rank)


@settings
class AdapterConfig:
    """Which linear layers are adapted, with which rank and scale, by whatever method."""

    targets: list[str] | str = "all-linear"
    """`all-linear` (every linear layer but the output head, those that cannot be adapted, and very small ones), or a
    list of module names, name suffixes (`q_proj`) or globs, in which `all-linear` may stand too
    (`[all-linear, lm_head]`). A run says what is left out."""

    exclude: list[str] = Field(default_factory=list)
    """Linears that are not adapted although `targets` means them: module names, name suffixes or globs."""

    layers: list[Block] | Block = "all"
    """The blocks of the model whose linears are adapted, as PEFT's `layers_to_transform`: `all`, or numbers from 0 and
    ranges with both ends (`8-15`, `[0-3, 31]`)."""

    train_whole: list[str] = Field(default_factory=list)
    """Modules whose own parameters are trained beside the adapters, as PEFT's `modules_to_save`: names, name suffixes
    (`norm`, `embed_tokens`) or globs. `embeddings-and-head` is the input embedding and the output head of any model.
    Linears among them are not adapted. Tied embeddings stay tied."""

    rank: Rank = 16
    """Rank r of the adapter of each linear layer; with SORSA the number of singular triplets that are trained. It may
    not exceed min(out, in) of any of these layers."""

    experts: Literal["adapt", "frozen"] = "adapt"
    """Whether the experts of a mixture are adapted that the model holds as one parameter, each with factors of its
    own. The router is never adapted. Experts that are linears of their own are linears like any other."""

    expert_rank: Rank = 8
    """The rank in each weight of such an expert, in the place of `rank`, with `method=sorsa` and `lora`. PEFT's other
    methods leave such experts as they are. Multiples of 8 go through PyTorch's grouped products on a GPU; with SORSA
    other ranks take one product for each expert, and a wait."""

    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Ranks of single layers: name, suffix or glob -> rank. The first match takes the place of `rank` and
    `expert_rank`."""

    alpha: PositiveFloat | None = None
    """What an adapter computes is scaled by alpha / rank; SORSA's W_r is computed accordingly. Unset: the scale is 1,
    as in the papers and their comparisons."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, PEFT's `use_rslora`). It needs `alpha`."""

    dropout: Fraction = 0.0
    """Dropout probability on the input of the adapter (SORSA: of the principal branch), in training only."""

    def scale(self, rank: int) -> float:
        """The factor by which what an adapter of this rank computes is multiplied."""
        return adapter_scale(self.alpha, rank, self.rslora)

    def __post_init__(self) -> None:
        if self.rslora and self.alpha is None:
            raise ValueError("adapter.rslora=true scales by alpha / sqrt(rank): set adapter.alpha, which is unset")
