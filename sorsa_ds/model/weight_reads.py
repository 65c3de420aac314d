"""Linears whose weight a model reads without calling them, found in the source code of the model's own modules.

Such a linear cannot be adapted: a layer with the sum W_r + U diag(s) V^T has no weight that could be read. Mamba's
fused kernels, for example, take the weight of `out_proj` as an argument. Reading the source finds every path, those too
that only a GPU takes; a trial run on this machine would not. What reads a weight in a way that the source does not show
gets an error from the layer itself (`sorsa_ds.sorsa.layer.SorsaLinear.weight`).
"""

import ast
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

from torch import nn

from sorsa_ds.model.source_code import methods_of, names_of

FACTS = ("dtype", "device", "shape", "ndim", "requires_grad")
"""What may be asked of a weight without reading its numbers."""

_MAKING = ("__init__", "_init", "init_", "reset_parameters", "tie_weights", "extra_repr")
"""How the names of methods begin that make or describe a module. They run before a linear is replaced, or print."""

_PLAIN = (ast.Expression, ast.Attribute, ast.Name, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Load,
          ast.cmpop, ast.boolop, ast.unaryop)  # fmt: skip
"""What a condition may consist of to be looked up: names and comparisons, but no call of a function. Properties of the
module are asked, which its own constructor could have asked too."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A place in a class where a weight is read.

    names: the way from the object to the linear, such as ("mlp", "gate") where self.mlp.gate.weight is read.
    own: whether that object is the module itself.
    conditions: (test, the value that it must have) of the `if`s around the place.
    """

    names: tuple[str, ...]
    own: bool
    place: str
    conditions: tuple[tuple[ast.expr, bool], ...]


def weight_reads(model: nn.Module) -> dict[str, str]:
    """Linears whose weight is read without a call: name -> the method that does so, such as MambaMixer.slow_forward.

    A read behind a condition that the model's settings make false is none.
    """
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    for path, module in modules.items():
        for read in _reads_of(cast(Hashable, type(module))):
            if not all(_may_be(test, wanted, module) for test, wanted in read.conditions):
                continue
            end = ".".join(read.names)
            start = f"{path}." if path else ""
            if read.own:
                meant = [start + end]
            else:
                meant = [n for n in modules if n.startswith(start) and f".{n}".endswith(f".{end}")]
            for name in meant:
                if isinstance(modules.get(name), nn.Module):
                    found.setdefault(name, read.place)
    return found


@cache
def _reads_of(kind: Hashable) -> tuple[_Read, ...]:
    """The places in a class and its bases where the weight of something is read."""
    reads: list[_Read] = []
    assert isinstance(kind, type)
    for base, methods in methods_of(kind):
        for method in methods:
            if not method.name.startswith(_MAKING):
                reads += _reads_in(method.body, f"{base.__name__}.{method.name}", ())
    return tuple(reads)


def _reads_in(nodes: Sequence[ast.AST], place: str, conditions: tuple[tuple[ast.expr, bool], ...]) -> Iterator[_Read]:
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue  # `_reads_of` comes to it by itself
        if isinstance(node, ast.If | ast.IfExp):
            yield from _reads_in([node.test], place, conditions)
            for branch, value in ((node.body, True), (node.orelse, False)):
                inside = branch if isinstance(branch, list) else [branch]
                yield from _reads_in(inside, place, (*conditions, (node.test, value)))
        elif isinstance(node, ast.Attribute) and node.attr in FACTS and _is_weight(node.value):
            continue
        elif isinstance(node, ast.Attribute) and _is_weight(node):
            names = names_of(node.value)
            if len(names) > 1:
                yield _Read(tuple(names[1:]), names[0] == "self", place, conditions)
        else:
            yield from _reads_in(list(ast.iter_child_nodes(node)), place, conditions)


def _is_weight(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)


def _may_be(test: ast.expr, wanted: bool, module: nn.Module) -> bool:
    """Whether a condition may have a value; it may have any where it cannot be looked up, or changes while training."""
    expression = ast.Expression(test)
    parts = list(ast.walk(expression))
    changes = any(isinstance(part, ast.Attribute) and part.attr == "training" for part in parts)
    if changes or not all(isinstance(part, _PLAIN) for part in parts):
        return True
    try:
        return bool(eval(compile(expression, "<condition>", "eval"), {"__builtins__": {}}, {"self": module})) == wanted
    except Exception:
        return True
