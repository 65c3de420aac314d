"""Which linears are adapted, with which rank, and the swap itself.

A model is always operated on the meta device: the swap only changes shapes; `sorsa_ds.model.load` fills them.
"""

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers.pytorch_utils import Conv1D

from sorsa_ds.config.schema import SorsaConfig
from sorsa_ds.model.architectures import mixing_linears, uncalled_linears
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.residual_storage import Storage


@dataclass(frozen=True, slots=True)
class Target:
    """One linear to adapt. `transposed`: its weight is stored (in, out), as in GPT-2's Conv1D."""

    name: str
    out_features: int
    in_features: int
    rank: int
    bias: bool
    transposed: bool

    @property
    def trainable(self) -> int:
        """Trained parameters of the layer, r (m + n + 1)."""
        return self.rank * (self.out_features + self.in_features + 1)


def matches(name: str, pattern: str) -> bool:
    """Whether a module name is a pattern, ends in it after a dot (`self_attn.q_proj`), or fits it as a glob."""
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)


def select(model: nn.Module, config: SorsaConfig) -> list[Target]:
    """The linears that the configuration names, in module order.

    Raises:
        ValueError: a pattern matches no linear (the message lists what exists) or one that the model does not call, or
            a rank exceeds a layer's min(out, in) (the message names the layer).
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if config.targets == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        kept = mixing_linears(model)
        chosen = {n for n, module in linears.items() if module is not head and not any(matches(n, p) for p in kept)}
    else:
        patterns = [config.targets] if isinstance(config.targets, str) else config.targets
        chosen = {name for name in linears for pattern in patterns if matches(name, pattern)}
        check_all_match("sorsa.targets", patterns, linears)
        _check_called(chosen, uncalled_linears(model))
    if not chosen:
        raise ValueError(
            "sorsa.targets selects no linear: the list is empty, or the model has none but its output head"
        )
    check_all_match("sorsa.rank_pattern", config.rank_pattern, chosen)

    targets = []
    for name in linears:
        if name in chosen:
            rank = next((r for p, r in config.rank_pattern.items() if matches(name, p)), config.rank)
            targets.append(_target(name, linears[name], rank))
    return targets


def operate(
    model: nn.Module, targets: list[Target], sorsa: SorsaConfig, precision: Precision, storage: Storage
) -> None:
    """Freeze the model and put an uninitialised SorsaLinear (on the meta device) in each target's place."""
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
    """Factor of a target's principal branch."""
    return 1.0 if sorsa.alpha is None else sorsa.alpha / target.rank


def sorsa_layers(model: nn.Module) -> dict[str, SorsaLinear]:
    """The adapted layers of a model by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SorsaLinear)}


def _target(name: str, module: nn.Module, rank: int) -> Target:
    transposed = isinstance(module, Conv1D)
    shape = getattr(module.weight, "ds_shape", module.weight.shape)  # ZeRO-3 empties the shape of what it cuts
    n, m = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
    if rank > min(m, n):
        raise ValueError(
            f"rank {rank} exceeds min(out, in) = {min(m, n)} of {name} ({m} x {n}): lower sorsa.rank, or give this "
            f"layer its own in sorsa.rank_pattern"
        )
    return Target(name, m, n, rank, bias=module.bias is not None, transposed=transposed)


def _check_called(chosen: Iterable[str], uncalled: Iterable[str]) -> None:
    """Stop at the first target that the model does not call."""
    for name in sorted(chosen):
        if any(matches(name, pattern) for pattern in uncalled):
            raise ValueError(
                f"sorsa.targets: {name} cannot be adapted: the model reads its weight without calling it; leave it out"
            )


def check_all_match(field: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Stop at the first pattern that fits no name of a linear.

    Raises:
        ValueError: naming the nearest kind, and all that exist.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            kinds = Counter(name.rpartition(".")[2] for name in names)
            near = difflib.get_close_matches(pattern, kinds, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            listing = ", ".join(f"{kind} (x{count})" for kind, count in kinds.items())
            raise ValueError(f"{field}: {pattern!r} matches no linear of this model.{hint} It has: {listing}")
