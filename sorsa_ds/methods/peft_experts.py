"""How PEFT keeps a LoRA of experts that a model holds as one parameter (E, P, Q).

PEFT (`target_parameters`) wraps the module that holds the parameter, and once more for each further parameter of it, so
that the last one's layer is outermost. A is (E R, N) and B is (M, R E): the expert is the slowest number of A's rows
and the quickest of B's columns. Which side of the matrices PEFT takes for N is said by their module's `is_transposed`;
where it has none, as in Llama 4, PEFT may take (N, M) for (M, N).

Shapes, used as suffixes of tensor names: E experts, M out_features, N in_features, R rank.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from sorsa_ds.model.experts import find_stacks, modules_of
from sorsa_ds.model.targets import Target

INSIDE = ".base_layer"
"""What PEFT puts after the name of a module that it has wrapped."""


def layer_names(model: nn.Module) -> dict[str, str]:
    """The parameters that hold a model's experts -> the name of PEFT's layer for each, all of them being adapted.

    Args:
        model: with or without PEFT's layers; it needs no memory.
    """
    names = {}
    for stacks in modules_of([stack for stack in find_stacks(model)[0] if not stack.flat]):
        holder, name = model.get_submodule(stacks[0].holder), bare(stacks[0].holder)
        leaves = {stack.leaf for stack in stacks}
        ordered = [leaf for leaf, _ in holder.named_parameters(recurse=False) if leaf in leaves]
        for outside, leaf in enumerate(reversed(ordered)):
            names[f"{name}.{leaf}"] = name + INSIDE * outside
    return names


def bare(name: str) -> str:
    """The name of a parameter without PEFT's layers around the module that holds it."""
    return name.replace(INSIDE, "")


def holder_of(model: nn.Module, target: Target) -> nn.Module | None:
    """The module of a model without PEFT's layers that holds a target of experts; None where the target is a linear."""
    return model.get_submodule(target.holder) if target.experts else None


def is_turned(holder: nn.Module | None, target: Target) -> bool:
    """Whether PEFT takes the matrices of a target's parameter for (N, M).

    Args:
        holder: the module that holds the parameter of experts; None for a linear that PEFT adapts as a linear.
    """
    return holder is not None and target.transposed != bool(getattr(holder, "is_transposed", False))


def apart(A: Tensor, B: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """A (R, N) and B (M, R) of each matrix, with E before them where there are several."""
    if not target.experts:
        return A, B
    return A.unflatten(0, (target.experts, -1)), B.unflatten(1, (-1, target.experts)).permute(2, 0, 1)


def together(A: Tensor, B: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """What `apart` takes apart."""
    return (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)) if target.experts else (A, B)


def as_parameters(model: nn.Module, targets: Iterable[Target]) -> list[Target]:
    """The targets that PEFT must adapt as parameters: experts, and linears that it would take for something else.

    An adapter of an older transformers names the linears of single experts, such as `gate_proj`. PEFT turns whatever
    ends in such a name into the parameter that experts are now, also a linear of that name which is there.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def kept(leaf: str) -> bool:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:
            return False
        return leaf in (config.target_modules or ())

    targets = list(targets)
    leaves = {target.leaf for target in targets if not target.experts}
    misread = {leaf for leaf in leaves if not kept(leaf)}
    return [target for target in targets if target.experts or target.leaf in misread]
