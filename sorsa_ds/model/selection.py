"""Which weights of a model are adapted, with which rank, and what is left out for which reason."""

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Set
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sorsa_ds.config.schema import AdapterConfig
from sorsa_ds.model.architectures import mixing_linears, uncalled_linears
from sorsa_ds.model.blocks import outside_blocks
from sorsa_ds.model.experts import Stack, find_stacks, modules_of
from sorsa_ds.model.language_part import in_language_part
from sorsa_ds.model.linear_classes import computes_linear
from sorsa_ds.model.linears import check_together, linears_of, shared_linears
from sorsa_ds.model.module_names import check_all_match, kind_of, matches
from sorsa_ds.model.targets import Target, counted
from sorsa_ds.model.weight_reads import weight_reads
from sorsa_ds.model.whole_modules import WholeParameter, held_by, whole_parameters, whole_row

ALL_LINEAR = "all-linear"
"""The pattern that means every linear but the output head and what cannot or need not be adapted."""

EXCLUDED = "named by adapter.exclude"
WHOLE = "trained whole (adapter.train_whole)"
OUTSIDE = "it lies outside of the language model, and text does not reach it"
SMALLEST_SIDE = 8
"""Linears with a shorter side than this have no rank that would save anything, such as a gate with one output."""

SMALLEST_SHARE = 0.5
"""A run warns where a smaller share of the weights is adapted."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What `choose` has chosen of a model.

    targets: the linears to adapt, in module order.
    left_out: the linears that `all-linear` passes over -> the reason, as half a sentence. The output head, which it
        never means, is not among them.
    body: numbers in all parameters of the model but its embeddings and its output head.
    adapted: numbers of the body that lie in the weights of the targets, or in what is trained whole.
    whole: the parameters that are trained whole beside the adapters, in module order.
    """

    targets: list[Target]
    left_out: dict[str, str]
    body: int
    adapted: int
    whole: list[WholeParameter] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The share of the body that training changes."""
        return self.adapted / self.body if self.body else 0.0

    def rows(self, relation: str = "more") -> list[tuple[str, str]]:
        """Rows of the table at the beginning of a run: how much is adapted, and what is left out for which reason.

        Args:
            relation: words behind the number of parameters trained whole: `more` or `of them` (see `whole_row`).
        """
        told = [("adapted", f"{counted(self.targets)}; {self.share:.1%} of the weights between embeddings and head")]
        told += [("trained whole", whole_row(self.whole, relation))] if self.whole else []
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


def choose(model: nn.Module, config: AdapterConfig, refused_experts: str = "", refused_flat: str = "") -> Selection:
    """The linears that the configuration names, and those that `all-linear` leaves out.

    Args:
        refused_experts: why experts held as one parameter are left out, as half a sentence; empty: they are adapted.
        refused_flat: why experts in a parameter of two dimensions are left out; empty: they are adapted as others are.

    Raises:
        ValueError: a pattern matches no linear (the message lists what exists) or one that cannot be adapted or is to
            be trained whole, nothing is selected, a rank exceeds min(out, in) of a layer (the message names the layer),
            the model has no block of a number, or `whole_parameters` finds bad modules.
    """
    linears = linears_of(model)
    stacks, unknown = find_stacks(model)
    shapes = {name: _shape(module) for name, module in linears.items()}
    shapes |= {stack.name: (stack.out_features, stack.in_features) for stack in stacks}
    patterns = [config.targets] if isinstance(config.targets, str) else config.targets
    named = [pattern for pattern in patterns if pattern != ALL_LINEAR]
    check_all_match("adapter.targets", named, shapes)
    check_all_match("adapter.exclude", config.exclude, shapes)
    excluded = outside_blocks(shapes, config.layers, in_language_part(model))
    excluded |= {name: EXCLUDED for name in shapes if any(matches(name, pattern) for pattern in config.exclude)}
    meant = {name for name in shapes if any(matches(name, pattern) for pattern in named)}
    chosen = meant - excluded.keys()
    shared = shared_linears(linears)
    unfit = _unfit(model, linears) | _unfit_experts(model, stacks, config, refused_experts, refused_flat)
    whole = whole_parameters(model, config.train_whole)
    taken = held_by(linears, whole) | {one.name: one.name for one in whole if one.name in shapes}
    _check_named(chosen, taken, unfit)
    head = _output_head(model)
    left_out = {name: why for name, why in excluded.items() if why == EXCLUDED or name in meant}
    ranks = {name: _rank(name, config, name not in linears) for name in shapes}
    if ALL_LINEAR in patterns:
        body = {name for name in shapes if name not in linears or linears[name] is not head}
        reasons = _unneeded(model, shapes, ranks) | unknown | unfit | excluded | dict.fromkeys(taken, WHOLE)
        reasons |= _whole_modules(stacks, reasons.keys() - chosen)
        known = [name for name in shapes if name in reasons and name in body | meant]
        left_out = {name: reasons[name] for name in [*known, *unknown] if name not in chosen}
        chosen |= body - left_out.keys()
    for first, others in shared.items():
        check_together({first, *others}, chosen)
        chosen -= {*others}
    if not chosen:
        raise ValueError(
            "adapter.targets selects no linear: the list is empty, or the model has no linear but its output head"
            + (f" and others that are left out: {summed_up(left_out)}" if left_out else "")
        )
    _check_whole_modules(stacks, chosen)
    _check_patterns(config, shapes, chosen, left_out)
    _check_ranks(shapes, ranks, chosen, {stack.name for stack in stacks})
    targets = [_target(name, linears[name], ranks[name], shared.get(name, ())) for name in linears if name in chosen]
    targets += [_stack_target(stack, ranks[stack.name]) for stack in stacks if stack.name in chosen]
    sizes = _body(model)
    inside = sum(target.numel for target in targets if target.weight in sizes)
    inside += sum(one.numel for one in whole if one.name in sizes)
    return Selection(_in_module_order(model, targets), left_out, sum(sizes.values()), inside, whole)


def select_targets(model: nn.Module, config: AdapterConfig) -> list[Target]:
    """The linears that the configuration names, in module order.

    Raises:
        ValueError: a pattern, a rank or a block does not fit the model, or nothing is selected (see `choose`).
    """
    return choose(model, config, refused_experts="it holds experts, and linears alone are asked for").targets


def body_of(model: nn.Module) -> int:
    """Numbers in all parameters of a language model but its embeddings and its output head."""
    return sum(_body(model).values())


def _body(model: nn.Module) -> dict[str, int]:
    """The parameters of a language model but its embeddings and its output head -> their numbers.

    Embeddings of positions and the like are left out too, and what is tied to one of these. Of a model that also sees
    or hears, the language model counts.
    """
    ends: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if (head := _output_head(model)) is not None:
        ends.append(head)
    apart = {id(parameter) for end in ends for parameter in end.parameters()}
    is_text = in_language_part(model)
    return {
        name: getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in model.named_parameters()
        if id(parameter) not in apart and is_text(name)
    }


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
    outside = {name: OUTSIDE for name, module in linears.items() if not is_text(name) and module is not head}
    return own | read | listed | outside


def _unneeded(model: nn.Module, shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> dict[str, str]:
    """What could be adapted, and what `all-linear` does not mean -> the reason, as half a sentence."""
    mixing = mixing_linears(model)
    reasons = {}
    for name, shape in shapes.items():
        if any(matches(name, pattern) for pattern in mixing):
            reasons[name] = "a small projection that mixes tokens"
        elif min(shape) < SMALLEST_SIDE and min(shape) < ranks[name]:
            reasons[name] = f"a side shorter than {SMALLEST_SIDE} and than the rank"
    return reasons


def _unfit_experts(
    model: nn.Module, stacks: list[Stack], config: AdapterConfig, refused: str, refused_flat: str
) -> dict[str, str]:
    """Stacked experts that cannot be adapted -> the reason, as half a sentence. The arguments are those of `choose`."""
    is_text = in_language_part(model)
    frozen = "" if config.experts == "adapt" else "adapter.experts is frozen"
    reasons = {stack.name: refused or frozen or (refused_flat if stack.flat else "") for stack in stacks}
    outside = {stack.name: OUTSIDE for stack in stacks if not is_text(stack.name)}
    return {name: reason for name, reason in reasons.items() if reason} | outside


def _check_named(chosen: Set[str], taken: Mapping[str, str], unfit: Mapping[str, str]) -> None:
    """Stop where linears that are named cannot be adapted.

    Args:
        taken: linears that are to be trained whole -> the module by which. unfit: others -> the reason.

    Raises:
        ValueError: naming the first one.
    """
    for name in sorted(chosen & taken.keys()):
        raise ValueError(
            f"adapter.train_whole: {taken[name]} would be trained whole, and it belongs to {name}, which "
            f"adapter.targets adapts: leave it out of one of them"
        )
    for name in sorted(chosen & unfit.keys()):
        raise ValueError(f"adapter.targets: {name} cannot be adapted, since {unfit[name]}; leave it out")


def _whole_modules(stacks: list[Stack], left_out: Set[str]) -> dict[str, str]:
    """Further experts to leave out, since the other weights of their module are."""
    return {
        stack.name: "another weight of the same experts is left out"
        for some in modules_of(stacks) if any(stack.name in left_out for stack in some)
        for stack in some if stack.name not in left_out
    }  # fmt: skip


def _check_whole_modules(stacks: list[Stack], chosen: Set[str]) -> None:
    """Stop where some weights of a module's experts are to be adapted, and others are not.

    Raises:
        ValueError: naming one that is, and those that are not.
    """
    for some in modules_of(stacks):
        lacking = [stack.leaf for stack in some if stack.name not in chosen]
        if lacking and len(lacking) < len(some):
            inside = next(stack.name for stack in some if stack.name in chosen)
            raise ValueError(
                f"adapter.targets: {inside} is adapted, and {', '.join(lacking)} of the same experts is not; name "
                f"both, or none"
            )


def _check_patterns(
    config: AdapterConfig, names: Collection[str], chosen: Set[str], left_out: Mapping[str, str]
) -> None:
    """Stop where a pattern of `adapter.rank_pattern` means nothing that is adapted.

    Raises:
        ValueError: naming the pattern, and why what it means is not adapted.
    """
    check_all_match("adapter.rank_pattern", config.rank_pattern, names)
    for pattern in config.rank_pattern:
        meant = [name for name in names if matches(name, pattern)]
        if not chosen & {*meant}:
            reason = left_out.get(meant[0], "adapter.targets does not name it")
            raise ValueError(f"adapter.rank_pattern: {pattern!r} means {meant[0]}, which is not adapted: {reason}")


def _rank(name: str, config: AdapterConfig, experts: bool) -> int:
    own = config.expert_rank if experts else config.rank
    return next((rank for pattern, rank in config.rank_pattern.items() if matches(name, pattern)), own)


def _target(name: str, module: nn.Linear | Conv1D, rank: int, shared: tuple[str, ...]) -> Target:
    m, n = _shape(module)
    return Target(name, m, n, rank, module.bias is not None, isinstance(module, Conv1D), shared)


def _stack_target(stack: Stack, rank: int) -> Target:
    m, n = stack.out_features, stack.in_features
    return Target(stack.name, m, n, rank, bias=False, transposed=stack.transposed, experts=stack.experts)


def _check_ranks(
    shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], chosen: Set[str], experts: Set[str]
) -> None:
    """Stop where ranks exceed what layers have.

    Args:
        shapes: the shape of every layer by its name, (out_features, in_features).
        experts: the layers that are stacked experts.

    Raises:
        ValueError: naming a layer of every shape that is too small, and the largest rank that all of them allow.
    """
    small = [name for name in shapes if name in chosen and ranks[name] > min(shapes[name])]
    if not small:
        return
    alike: dict[tuple[tuple[int, int], int], list[str]] = {}
    for name in small:
        alike.setdefault((shapes[name], ranks[name]), []).append(name)
    told = "; ".join(
        f"rank {rank} exceeds min(out, in) = {min(shape)} of {names[0]} ({shape[0]} x {shape[1]})"
        + (f" and of {len(names) - 1} more" if len(names) > 1 else "")
        for (shape, rank), names in alike.items()
    )
    settings = sorted({"adapter.expert_rank" if name in experts else "adapter.rank" for name in small})
    largest = min(min(shapes[name]) for name in small)
    raise ValueError(
        f"{told}: lower {' and '.join(settings)} (all of them allow {largest}), give such layers their own in "
        f"adapter.rank_pattern, or leave them out by adapter.exclude"
    )


def _in_module_order(model: nn.Module, targets: list[Target]) -> list[Target]:
    """The targets in the order of the model's parameters."""
    order = {name: number for number, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return sorted(targets, key=lambda target: order[target.weight])


def _shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(out_features, in_features)."""
    weight = cast(Tensor, module.weight)
    shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 empties the shape of a parameter that it cuts
    return (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])
