"""The linears of a model, and those among them that have one weight."""

from collections.abc import Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D


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
        ValueError: some linears have one weight and different biases, so that they cannot be trained as one.
    """
    groups: dict[int, list[str]] = {}
    for name, module in linears.items():
        groups.setdefault(id(module.weight), []).append(name)
    for names in groups.values():
        if len({id(linears[name].bias) for name in names if linears[name].bias is not None}) > 1:
            raise ValueError(
                f"{names[0]} and {names[1]} have one weight and different biases, and cannot be trained as one layer; "
                f"name other linears in adapter.targets"
            )
    return {first: tuple(others) for first, *others in groups.values() if others}


def check_together(names: set[str], chosen: set[str]) -> None:
    """Stop where some, and not all, of the linears that have one weight are chosen.

    Raises:
        ValueError: naming one of either.
    """
    if chosen & names and names - chosen:
        raise ValueError(
            f"adapter.targets: {min(chosen & names)} and {min(names - chosen)} have one weight in this model, so they "
            f"are adapted together or not at all; name both (by their last parts, say), or neither"
        )
