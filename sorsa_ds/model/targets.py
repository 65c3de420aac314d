"""Which linears are adapted, with which rank, and their replacement by SORSA layers.

The new layers are made on the meta device, so replacing takes no memory; `sorsa_ds.model.fill` fills them.
"""

import difflib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sorsa_ds.config.schema import SorsaConfig
from sorsa_ds.model.architectures import mixing_linears, uncalled_linears
from sorsa_ds.model.language_part import in_language_part
from sorsa_ds.model.linear_classes import computes_linear
from sorsa_ds.model.weight_reads import weight_reads
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.residual_storage import Storage

ALL_LINEAR = "all-linear"
"""The pattern that means every linear but the output head and what cannot or need not be adapted."""

EXCLUDED = "named by sorsa.exclude"

SMALLEST_SIDE = 8
"""Linears with a shorter side than this have no rank that would save anything, such as a gate with one output."""

SMALLEST_SHARE = 0.5
"""A run warns where a smaller share of the weights is adapted."""


@dataclass(frozen=True, slots=True)
class Target:
    """One linear to adapt.

    transposed: whether its weight is stored as (in, out), as in GPT-2's Conv1D.
    shared: names of further linears that have the same weight, as in Zamba's shared blocks. They are one layer.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    bias: bool
    transposed: bool
    shared: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[str, ...]:
        """Every name in the model under which the layer stands."""
        return self.name, *self.shared

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
    """

    targets: list[Target]
    left_out: dict[str, str]
    body: int
    adapted: int

    @property
    def share(self) -> float:
        """The share of the body that lies in the weights of the targets."""
        return self.adapted / self.body if self.body else 0.0

    def rows(self) -> list[tuple[str, str]]:
        """Rows of the table at the beginning of a run: how much is adapted, and what is left out for which reason."""
        told = [
            ("adapted", f"{len(self.targets)} linears, {self.share:.1%} of the weights between embeddings and head")
        ]
        return [*told, ("left out", summed_up(self.left_out))] if self.left_out else told

    @property
    def warning(self) -> str | None:
        """A sentence where less than a half of the body is adapted: most of the model stays as it is."""
        if self.share >= SMALLEST_SHARE:
            return None
        return (
            f"Warning: only {self.share:.1%} of the weights between the embeddings and the output head are adapted; "
            f"the others stay as they are."
        )


def matches(name: str, pattern: str) -> bool:
    """Whether a module name is a pattern, ends in it after a dot (`self_attn.q_proj`), or fits it as a glob."""
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)


def choose(model: nn.Module, config: SorsaConfig) -> Selection:
    """The linears that the configuration names, and those that `all-linear` leaves out.

    Raises:
        ValueError: a pattern matches no linear (the message lists what exists) or one that cannot be adapted, nothing
            is selected, or a rank exceeds min(out, in) of a layer (the message names the layer).
    """
    linears = linears_of(model)
    patterns = [config.targets] if isinstance(config.targets, str) else config.targets
    named = [pattern for pattern in patterns if pattern != ALL_LINEAR]
    check_all_match("sorsa.targets", named, linears)
    check_all_match("sorsa.exclude", config.exclude, linears)
    excluded = {name: EXCLUDED for name in linears if any(matches(name, pattern) for pattern in config.exclude)}
    chosen = {name for name in linears if any(matches(name, pattern) for pattern in named)} - excluded.keys()
    shared = shared_linears(linears)
    unfit, head, left_out = _unfit(model, linears), _output_head(model), dict(excluded)
    for name in sorted(chosen & unfit.keys()):
        raise ValueError(f"sorsa.targets: {name} cannot be adapted, since {unfit[name]}; leave it out")
    if ALL_LINEAR in patterns:
        body = {name for name, module in linears.items() if module is not head}
        reasons = _unneeded(model, linears, config) | unfit | excluded
        left_out = {name: reasons[name] for name in linears if name in (reasons.keys() & body) - chosen}
        chosen |= body - left_out.keys()
    for first, others in shared.items():
        _check_together({first, *others}, chosen)
        chosen -= {*others}
    if not chosen:
        raise ValueError(
            "sorsa.targets selects no linear: the list is empty, or the model has no linear but its output head"
            + (f" and others that are left out: {summed_up(left_out)}" if left_out else "")
        )
    check_all_match("sorsa.rank_pattern", config.rank_pattern, chosen)
    targets = [
        _target(name, linears[name], _rank(name, config), shared.get(name, ())) for name in linears if name in chosen
    ]
    inside = sum(target.out_features * target.in_features for target in targets if linears[target.name] is not head)
    return Selection(targets, left_out, body_of(model), inside)


def select_targets(model: nn.Module, config: SorsaConfig) -> list[Target]:
    """The linears that the configuration names, in module order.

    Raises:
        ValueError: as `choose`.
    """
    return choose(model, config).targets


def linears_of(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """All linears of a model by name, in module order: one name for each attribute of a module that holds one.

    A linear that several modules hold has several names; one that lies in a block which several layers hold has one.
    """
    found: dict[tuple[int, str], tuple[str, nn.Linear | Conv1D]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | Conv1D):
            parent, _, leaf = name.rpartition(".")
            found.setdefault((id(model.get_submodule(parent)), leaf), (name, module))
    return dict(found.values())


def shared_linears(linears: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """The first of all linears that have one weight -> the others; only where there are others.

    Raises:
        ValueError: they have one weight and different biases, so that they cannot be trained as one.
    """
    groups: dict[int, list[str]] = {}
    for name, module in linears.items():
        groups.setdefault(id(module.weight), []).append(name)
    for names in groups.values():
        if len({id(linears[name].bias) for name in names if linears[name].bias is not None}) > 1:
            raise ValueError(
                f"{names[0]} and {names[1]} have one weight and different biases, and cannot be trained as one layer; "
                f"name other linears in sorsa.targets"
            )
    return {first: tuple(others) for first, *others in groups.values() if others}


def _check_together(names: set[str], chosen: set[str]) -> None:
    """Stop where some, and not all, of the linears that have one weight are chosen.

    Raises:
        ValueError: naming one of either.
    """
    if chosen & names and names - chosen:
        raise ValueError(
            f"sorsa.targets: {min(chosen & names)} and {min(names - chosen)} have one weight in this model, so they "
            f"are adapted together or not at all; name both (by their last parts, say), or neither"
        )


def body_of(model: nn.Module) -> int:
    """Numbers in all parameters of a language model but its embeddings and its output head.

    Embeddings of positions and the like are left out too, and what is tied to one of these. Of a model that also sees
    or hears, the language model counts.
    """
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if (head := _output_head(model)) is not None:
        ends.append(head)
    apart = {id(parameter) for end in ends for parameter in end.parameters()}
    is_text = in_language_part(model)
    return sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in model.named_parameters()
        if id(parameter) not in apart and is_text(name)
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
        if not computes_linear(cast(Hashable, type(module)))
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
    is_text, head = in_language_part(model), _output_head(model)
    outside = {
        name: "it lies outside of the language model, and text does not reach it"
        for name, module in linears.items()
        if not is_text(name) and module is not head
    }
    return own | read | listed | outside


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
        replace_linear(model, target, layer)


def replace_linear(model: nn.Module, target: Target, layer: nn.Module) -> None:
    """Put a layer in the place of a target: the same one in each of its places."""
    for place in target.places:
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)


def scale_of(target: Target, sorsa: SorsaConfig) -> float:
    """The factor by which a target's principal branch is multiplied: alpha / rank, or 1 where alpha is unset."""
    return 1.0 if sorsa.alpha is None else sorsa.alpha / target.rank


def _target(name: str, module: nn.Linear | Conv1D, rank: int, shared: tuple[str, ...]) -> Target:
    m, n = _shape(module)
    if rank > min(m, n):
        raise ValueError(
            f"rank {rank} exceeds min(out, in) = {min(m, n)} of {name} ({m} x {n}): lower sorsa.rank, give this "
            f"layer its own in sorsa.rank_pattern, or leave it out by sorsa.exclude"
        )
    return Target(name, m, n, rank, module.bias is not None, isinstance(module, Conv1D), shared)


def _shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(out_features, in_features)."""
    weight = cast(Tensor, module.weight)
    shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 empties the shape of a parameter that it cuts
    return (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])


def kind_of(name: str) -> str:
    """The last part of a linear's name, which linears of all blocks share; numbers in a list are skipped."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def check_all_match(field: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Stop at the first pattern that matches no name of a linear.

    Raises:
        ValueError: a pattern matches none; the message names the most similar kind of linear, and all that exist.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            kinds = Counter(map(kind_of, names))
            near = difflib.get_close_matches(pattern, kinds, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            listing = ", ".join(f"{kind} (x{count})" for kind, count in kinds.items())
            raise ValueError(f"{field}: {pattern!r} matches no linear of this model.{hint} It has: {listing}")
