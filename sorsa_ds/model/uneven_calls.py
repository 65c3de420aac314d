"""Modules that call their submodules as often as their input says, such as once for each expert that a token has hit.

Under ZeRO-3 each call of a module gathers its parameters, which all ranks do together. Ranks with different tokens
would gather different numbers of times, and wait for each other for ever. DeepSpeed gathers all parameters of a *leaf*
at once, when the leaf itself is called, so the module that makes such calls is declared one. It is found in the source
code: a call in a loop over, or under a condition on, what tensors of the forward pass hold.
"""

import ast
from collections import Counter
from collections.abc import Collection, Hashable, Iterable
from functools import cache
from typing import cast

from torch import nn

from sorsa_ds.model.source_code import methods_of, names_of

_LOOKS_INTO_TENSORS = (
    "argwhere", "bincount", "item", "masked_select", "nonzero", "numpy", "tolist", "unique", "unique_consecutive",
    "where",
)  # fmt: skip
"""Functions and methods whose result depends on the numbers in a tensor, in a way that shapes or loops follow."""

_ASKS_A_TENSOR = ("all", "allclose", "amax", "amin", "any", "count_nonzero", "equal", "max", "min", "sum")
"""Further such functions in conditions of classes that are not transformers' own: there they ask which experts are hit.
In transformers' own classes they ask for masks, alike on all ranks, around whole models, which no leaf could hold."""


def set_uneven_leaves(model: nn.Module) -> list[nn.Module]:
    """Declare every module that makes uneven calls a leaf of ZeRO-3; returns these modules.

    Must be called before DeepSpeed's engine is made.
    """
    from deepspeed.utils import set_z3_leaf_module  # takes seconds, and a plan needs no DeepSpeed

    leaves = [module for module in model.modules() if calls_unevenly(module)]
    for leaf in leaves:
        set_z3_leaf_module(leaf, True)
    return leaves


def told_leaves(leaves: Iterable[nn.Module]) -> str:
    """A line on the modules that have been declared leaves."""
    kinds = Counter(type(leaf).__name__ for leaf in leaves)
    listing = ", ".join(f"{kind} (x{count})" for kind, count in kinds.items())
    return f"Each is gathered whole, because what it calls depends on the tokens of its rank: {listing}."


def calls_unevenly(module: nn.Module) -> bool:
    """Whether a module calls a submodule that has parameters as often as its input says."""
    for name in _uneven_names(cast(Hashable, type(module))):
        called = getattr(module, name, None)
        if isinstance(called, nn.Module) and next(called.parameters(), None) is not None:
            return True
    return False


@cache
def _uneven_names(kind: Hashable) -> frozenset[str]:
    """The attributes `self.NAME` that a class calls unevenly, or of whose entries it calls some."""
    assert isinstance(kind, type)
    found: set[str] = set()
    replaced: set[str] = set()
    for base, methods in methods_of(kind):
        if not methods:  # the class was made at run time, to compute in another way (`model.experts`)
            replaced |= vars(base).keys()
        for method in methods:
            if not method.name.startswith("_init") and method.name not in replaced:
                found |= _Uneven(method, foreign=not base.__module__.startswith("transformers.")).names
    return frozenset(found)


class _Uneven:
    """Finds the attributes that a method calls unevenly: `names`.

    Names that were assigned from something that looks into a tensor are followed, in the order of the source.

    Args:
        foreign: whether the class is not one of transformers.
    """

    def __init__(self, method: ast.FunctionDef, foreign: bool):
        self.names: set[str] = set()
        self._asks = _ASKS_A_TENSOR if foreign else ()
        self._looked: set[str] = set()
        self._entries: dict[str, str] = {}
        self._block(method.body, uneven=False)

    def _block(self, statements: Iterable[ast.stmt], uneven: bool) -> None:
        for statement in statements:
            if isinstance(statement, ast.For):
                inside = uneven or self._depends(statement.iter)
                self._bind(statement.target, self._depends(statement.iter))
                self._entry_of_loop(statement)
                self._block(statement.body, inside)
                self._block(statement.orelse, inside)
            elif isinstance(statement, ast.If | ast.While):
                inside = uneven or self._depends(statement.test, self._asks)
                self._calls(statement.test, uneven)
                self._block(statement.body, inside)
                self._block(statement.orelse, inside)
                if inside and not uneven and _leaves(statement.body):
                    uneven = True  # what follows is reached by some only
            elif isinstance(statement, ast.With):
                self._block(statement.body, uneven)
            elif isinstance(statement, ast.Try):
                handlers = [handler.body for handler in statement.handlers]
                for part in (statement.body, *handlers, statement.orelse, statement.finalbody):
                    self._block(part, uneven)
            elif not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                self._calls(statement, uneven)
                if isinstance(statement, ast.Assign):
                    for target in statement.targets:
                        self._bind(target, self._depends(statement.value))
                        self._entry(target, statement.value)

    def _bind(self, target: ast.expr, looked: bool) -> None:
        names = {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}
        self._looked = self._looked | names if looked else self._looked - names

    def _entry(self, target: ast.expr, value: ast.expr) -> None:
        """Remember `layer = self.experts[number]`."""
        if isinstance(target, ast.Name) and isinstance(value, ast.Subscript):
            names = names_of(value.value)
            if len(names) == 2 and names[0] == "self":
                self._entries[target.id] = names[1]

    def _entry_of_loop(self, loop: ast.For) -> None:
        """Remember the names in `for layer in self.experts` and `for number, layer in enumerate(self.experts)`."""
        lists = [names_of(node) for node in ast.walk(loop.iter) if isinstance(node, ast.Attribute)]
        held = [names[1] for names in lists if len(names) == 2 and names[0] == "self"]
        if len(held) == 1:
            for node in ast.walk(loop.target):
                if isinstance(node, ast.Name):
                    self._entries[node.id] = held[0]

    def _calls(self, node: ast.AST, uneven: bool) -> None:
        for made in ast.walk(node) if not uneven else ():
            if isinstance(made, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
                parts = [part for one in made.generators for part in (one.iter, *one.ifs)]
                if any(self._depends(part, self._asks) for part in parts):
                    self._calls(made, uneven=True)
        for call in ast.walk(node) if uneven else ():
            if isinstance(call, ast.Call):
                function = call.func.value if isinstance(call.func, ast.Subscript) else call.func
                names = names_of(function)
                if len(names) == 2 and names[0] == "self":
                    self.names.add(names[1])
                elif len(names) == 1 and names[0] in self._entries:
                    self.names.add(self._entries[names[0]])

    def _depends(self, expression: ast.expr, also: Collection[str] = ()) -> bool:
        """Whether the value of an expression follows the numbers in a tensor.

        Args:
            also: further names of functions that look into one.
        """
        for node in ast.walk(expression):
            if isinstance(node, ast.Name) and node.id in self._looked:
                return True
            if isinstance(node, ast.Subscript) and any(isinstance(x, ast.Compare) for x in ast.walk(node.slice)):
                return True  # as many rows as fulfil a condition
            if isinstance(node, ast.Call):
                function = node.func
                called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                if called in _LOOKS_INTO_TENSORS or called in also:
                    return True
        return False


def _leaves(statements: list[ast.stmt]) -> bool:
    """Whether a block ends with leaving the loop's pass, the loop or the function."""
    return bool(statements) and isinstance(statements[-1], ast.Continue | ast.Break | ast.Return)
