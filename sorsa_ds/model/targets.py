"""Which linears are adapted, with which rank, and their replacement by SORSA layers.

The new layers are made on the meta device, so replacing takes no memory; `sorsa_ds.model.fill` fills them.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sorsa_ds.config.schema import SorsaConfig
from sorsa_ds.model.architectures import mixing_linears, uncalled_linears
from sorsa_ds.model.module_names import check_all_match, kind_of, matches
from sorsa_ds.model.weight_reads import weight_reads
from sorsa_ds.model.whole_modules import WholeParameter, held_by, whole_parameters, whole_row
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.residual_storage import Storage

ALL_LINEAR = "all-linear"
"""The pattern that means every linear but the output head and what cannot or need not be adapted."""

EXCLUDED = "named by sorsa.exclude"
WHOLE = "trained whole (sorsa.train_whole)"

SMALLEST_SIDE = 8
"""Linears with a shorter side than this have no rank that would save anything, such as a gate with one output."""


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


@dataclass(frozen=True, slots=True)
class Selection:
    """What `choose` has chosen of a model.

    targets: the linears to adapt, in module order.
    left_out: the linears that `all-linear` passes over -> the reason, as half a sentence. The output head, which it
        never means, is not among them.
    body: numbers in all parameters of the model but its embeddings and its output head.
    adapted: those of them that lie in the weights of the targets.
    whole: the parameters that are trained whole beside the adapters, in module order.
    """

    targets: list[Target]
    left_out: dict[str, str]
    body: int
    adapted: int
    whole: list[WholeParameter] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The share of the body that lies in the weights of the targets."""
        return self.adapted / self.body if self.body else 0.0

    def rows(self) -> list[tuple[str, str]]:
        """Rows of the table at the beginning of a run: how much is adapted, and what is left out for which reason."""
        told = [
            ("adapted", f"{len(self.targets)} linears, {self.share:.1%} of the weights between embeddings and head")
        ]
        told += [("trained whole", whole_row(self.whole))] if self.whole else []
        return [*told, ("left out", summed_up(self.left_out))] if self.left_out else told


def choose(model: nn.Module, config: SorsaConfig) -> Selection:
    """The linears that the configuration names, and those that `all-linear` leaves out.

    Raises:
        ValueError: a pattern matches no linear (the message lists what exists) or one that cannot be adapted or is to
            be trained whole, nothing is selected, a rank exceeds min(out, in) of a layer (the message names the layer),
            or `whole_parameters` finds bad modules.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    patterns = [config.targets] if isinstance(config.targets, str) else config.targets
    named = [pattern for pattern in patterns if pattern != ALL_LINEAR]
    check_all_match("sorsa.targets", named, linears)
    check_all_match("sorsa.exclude", config.exclude, linears)
    excluded = {name: EXCLUDED for name in linears if any(matches(name, pattern) for pattern in config.exclude)}
    chosen = {name for name in linears if any(matches(name, pattern) for pattern in named)} - excluded.keys()
    unfit, head, left_out = _unfit(model, linears), _output_head(model), dict(excluded)
    whole = whole_parameters(model, config.train_whole)
    taken = held_by(linears, whole)
    for name in sorted(chosen & taken.keys()):
        raise ValueError(
            f"sorsa.train_whole: {taken[name]} would be trained whole, and it belongs to {name}, which sorsa.targets "
            f"adapts: leave it out of one of them"
        )
    for name in sorted(chosen & unfit.keys()):
        raise ValueError(f"sorsa.targets: {name} cannot be adapted, since {unfit[name]}; leave it out")
    if ALL_LINEAR in patterns:
        body = {name for name, module in linears.items() if module is not head}
        reasons = _unneeded(model, linears, config) | unfit | excluded | dict.fromkeys(taken, WHOLE)
        left_out = {name: reasons[name] for name in linears if name in (reasons.keys() & body) - chosen}
        chosen |= body - left_out.keys()
    if not chosen:
        raise ValueError(
            "sorsa.targets selects no linear: the list is empty, or the model has no linear but its output head"
            + (f" and others that are left out: {summed_up(left_out)}" if left_out else "")
        )
    check_all_match("sorsa.rank_pattern", config.rank_pattern, chosen)
    targets = [_target(name, linears[name], _rank(name, config)) for name in linears if name in chosen]
    inside = sum(target.out_features * target.in_features for target in targets if linears[target.name] is not head)
    return Selection(targets, left_out, body_of(model), inside, whole)


def select_targets(model: nn.Module, config: SorsaConfig) -> list[Target]:
    """The linears that the configuration names, in module order.

    Raises:
        ValueError: as `choose`.
    """
    return choose(model, config).targets


def body_of(model: nn.Module) -> int:
    """Numbers in all parameters of a model but its embeddings and its output head; a tied one counts as these do."""
    find_embeddings = getattr(model, "get_input_embeddings", None)
    ends = [_output_head(model), find_embeddings() if find_embeddings else None]
    apart = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
    return sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for parameter in model.parameters()
        if id(parameter) not in apart
    )


def summed_up(left_out: Mapping[str, str]) -> str:
    """What is left out in a few words: the reasons, each with the kinds of linears and their number."""
    reasons: dict[str, Counter[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, Counter())[kind_of(name)] += 1
    return "; ".join(
        f"{', '.join(f'{kind} (x{count})' for kind, count in kinds.items())}: {reason}"
        for reason, kinds in reasons.items()
    )


def _output_head(model: nn.Module) -> nn.Module | None:
    find_head = getattr(model, "get_output_embeddings", None)
    return find_head() if find_head else None


def _unfit(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """Linears that cannot be adapted -> the reason, as half a sentence."""
    own = {
        name: f"its class {type(module).__name__} computes something else than a linear"
        for name, module in linears.items()
        if type(module).forward not in (nn.Linear.forward, Conv1D.forward)
    }
    read = {
        name: f"{place} reads its weight without calling it"
        for name, place in weight_reads(model).items()
        if name in linears
    }
    listed = {
        name: "the model reads its weight without calling it"
        for name in linears
        if any(matches(name, pattern) for pattern in uncalled_linears(model))
    }
    return own | read | listed


def _unneeded(model: nn.Module, linears: Mapping[str, nn.Linear | Conv1D], config: SorsaConfig) -> dict[str, str]:
    """Linears that could be adapted, and that `all-linear` does not mean -> the reason, as half a sentence."""
    mixing = mixing_linears(model)
    reasons = {}
    for name, module in linears.items():
        smallest = min(_shape(module))
        if any(matches(name, pattern) for pattern in mixing):
            reasons[name] = "a small projection that mixes tokens"
        elif smallest < SMALLEST_SIDE and smallest < _rank(name, config):
            reasons[name] = f"a side shorter than {SMALLEST_SIDE} and than the rank"
    return reasons


def _rank(name: str, config: SorsaConfig) -> int:
    return next((rank for pattern, rank in config.rank_pattern.items() if matches(name, pattern)), config.rank)


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
    m, n = _shape(module)
    if rank > min(m, n):
        raise ValueError(
            f"rank {rank} exceeds min(out, in) = {min(m, n)} of {name} ({m} x {n}): lower sorsa.rank, give this "
            f"layer its own in sorsa.rank_pattern, or leave it out by sorsa.exclude"
        )
    return Target(name, m, n, rank, bias=module.bias is not None, transposed=isinstance(module, Conv1D))


def _shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(out_features, in_features)."""
    weight = cast(Tensor, module.weight)
    shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 empties the shape of a parameter that it cuts
    return (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])
