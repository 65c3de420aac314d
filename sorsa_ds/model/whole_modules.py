"""Modules whose own parameters are trained beside the adapters (`adapter.train_whole`), as PEFT's `modules_to_save`."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from torch import nn

from sorsa_ds.model.module_names import check_all_match, kind_of, matches

EMBEDDINGS = "embeddings-and-head"
"""The pattern that means the input embedding and the output head, whatever the model calls them."""


@dataclass(frozen=True, slots=True)
class WholeParameter:
    """A parameter that is trained whole.

    names: all that the model has for it; several where it is tied. numel: how many numbers it has.
    """

    names: tuple[str, ...]
    numel: int

    @property
    def name(self) -> str:
        """The first of its names, which stands for it."""
        return self.names[0]

    @property
    def modules(self) -> list[str]:
        """The modules that hold it as their own."""
        return [name.rpartition(".")[0] for name in self.names]


def whole_parameters(model: nn.Module, patterns: Sequence[str]) -> list[WholeParameter]:
    """The parameters of the modules that some patterns name, in module order. Tied ones stand there once.

    Raises:
        ValueError: a pattern matches no module that has parameters (the message lists what exists), or the model does
            not tell its embeddings.
    """
    modules = {
        name: module for name, module in model.named_modules() if name and next(module.parameters(), None) is not None
    }
    named = [pattern for pattern in patterns if pattern != EMBEDDINGS]
    check_all_match("adapter.train_whole", named, modules, "module with parameters")
    chosen = [module for name, module in modules.items() if any(matches(name, pattern) for pattern in named)]
    if EMBEDDINGS in patterns:
        chosen += embeddings_and_head(model)
    wanted = {id(parameter) for module in chosen for parameter in module.parameters()}
    names: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in wanted:
            names.setdefault(id(parameter), []).append(name)
            sizes[id(parameter)] = getattr(parameter, "ds_numel", parameter.numel())
    return [WholeParameter(tuple(all_names), sizes[key]) for key, all_names in names.items()]


def embeddings_and_head(model: nn.Module) -> list[nn.Module]:
    """The modules of a model's input embedding and output head, which may be tied; one alone where it has no head.

    Raises:
        ValueError: the model does not tell its embeddings.
    """
    ends = [getattr(model, f"get_{kind}_embeddings", lambda: None)() for kind in ("input", "output")]
    if ends[0] is None:
        raise ValueError(
            f"adapter.train_whole: {EMBEDDINGS} means nothing in {type(model).__name__}, which does not tell its input "
            f"embedding; name the modules"
        )
    return [end for end in ends if end is not None]


def held_by(names: Container[str], whole: Sequence[WholeParameter]) -> dict[str, str]:
    """Those of the named modules that hold a parameter which is trained whole -> the first such parameter."""
    return {module: one.name for one in reversed(whole) for module in one.modules if module in names}


def whole_row(whole: Sequence[WholeParameter], relation: str = "more") -> str:
    """What is trained whole, in a few words: kinds of modules with what they are tied with, and the numbers in all.

    Args:
        relation: the word behind the number: `more` where it comes on top of the adapters' parameters, `of them` where
            it is part of the number told before.
    """
    kinds = dict.fromkeys(" tied with ".join(dict.fromkeys(map(kind_of, one.modules))) for one in whole)
    return f"{', '.join(kinds)}: {sum(one.numel for one in whole):,} parameters {relation}"
