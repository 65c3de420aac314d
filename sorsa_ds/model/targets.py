"""Which linears are adapted, with which rank, and their replacement by SORSA layers.

The new layers are made on the meta device, so replacing takes no memory; `sorsa_ds.model.fill` fills them.
"""

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sorsa_ds.config.schema import SorsaConfig
from sorsa_ds.model.architectures import mixing_linears, uncalled_linears
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.residual_storage import Storage


@dataclass(frozen=True, slots=True)
class Target:
    """One linear to adapt.

    transposed: whether its weight is stored as (in, out), as in GPT-2's Conv1D.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    bias: bool
    transposed: bool

    @property
    def trainable(self) -> int:
        """How many parameters SORSA trains in the layer: r (m + n + 1)."""
        return self.rank * (self.out_features + self.in_features + 1)


def matches(name: str, pattern: str) -> bool:
    """Whether a module name is a pattern, ends in it after a dot (`self_attn.q_proj`), or fits it as a glob."""
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)


def select_targets(model: nn.Module, config: SorsaConfig) -> list[Target]:
    """The linears that the configuration names, in module order.

    Raises:
        ValueError: a pattern matches no linear (the message lists what exists) or one that the model does not call, or
            a rank exceeds min(out, in) of a layer (the message names the layer).
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if config.targets == "all-linear":
        find_head = getattr(model, "get_output_embeddings", None)
        head = find_head() if find_head else None
        kept = mixing_linears(model)
        selected = {n for n, module in linears.items() if module is not head and not any(matches(n, p) for p in kept)}
    else:
        patterns = [config.targets] if isinstance(config.targets, str) else config.targets
        selected = {name for name in linears for pattern in patterns if matches(name, pattern)}
        check_all_match("sorsa.targets", patterns, linears)
        _check_called(selected, uncalled_linears(model))
    if not selected:
        raise ValueError(
            "sorsa.targets selects no linear: the list is empty, or the model has no linear but its output head"
        )
    check_all_match("sorsa.rank_pattern", config.rank_pattern, selected)

    targets = []
    for name in linears:
        if name in selected:
            rank = next((r for p, r in config.rank_pattern.items() if matches(name, p)), config.rank)
            targets.append(_target(name, linears[name], rank))
    return targets


def insert_sorsa_layers(
    model: nn.Module, targets: list[Target], sorsa: SorsaConfig, precision: Precision, storage: Storage
) -> None:
    """Freeze the model and put an uninitialised SorsaLinear (on the meta device) in the place of each target."""
    model.requires_grad_(False)
    for target in targets:
        parent_name, _, leaf = target.name.rpartition(".")
        layer = SorsaLinear(
            target.in_features,
            target.out_features,
            target.rank,
            bias=target.bias,
            scale=scale_of(target, sorsa),
            dropout=sorsa.dropout,
            device="meta",
            storage=storage,
            factor_dtype=precision.factor_dtype,
            bias_dtype=precision.residual_dtype,
        )
        setattr(model.get_submodule(parent_name), leaf, layer)


def scale_of(target: Target, sorsa: SorsaConfig) -> float:
    """The factor by which a target's principal branch is multiplied: alpha / rank, or 1 where alpha is unset."""
    return 1.0 if sorsa.alpha is None else sorsa.alpha / target.rank


def _target(name: str, module: nn.Linear | Conv1D, rank: int) -> Target:
    transposed = isinstance(module, Conv1D)
    weight = cast(Tensor, module.weight)
    shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 empties the shape of a parameter that it cuts
    n, m = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
    if rank > min(m, n):
        raise ValueError(
            f"rank {rank} exceeds min(out, in) = {min(m, n)} of {name} ({m} x {n}): lower sorsa.rank, or give this "
            f"layer its own in sorsa.rank_pattern"
        )
    return Target(name, m, n, rank, bias=module.bias is not None, transposed=transposed)


def _check_called(selected: Iterable[str], uncalled: Iterable[str]) -> None:
    """Stop at the first target whose weight the model reads without calling the linear."""
    for name in sorted(selected):
        if any(matches(name, pattern) for pattern in uncalled):
            raise ValueError(
                f"sorsa.targets: {name} cannot be adapted: the model reads its weight without calling it; leave it out"
            )


def check_all_match(field: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Stop at the first pattern that matches no name of a linear.

    Raises:
        ValueError: a pattern matches none; the message names the most similar kind of linear, and all that exist.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            kinds = Counter(name.rpartition(".")[2] for name in names)
            near = difflib.get_close_matches(pattern, kinds, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            listing = ", ".join(f"{kind} (x{count})" for kind, count in kinds.items())
            raise ValueError(f"{field}: {pattern!r} matches no linear of this model.{hint} It has: {listing}")
