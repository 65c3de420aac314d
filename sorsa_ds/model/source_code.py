"""The source code of a model's own classes, to see what they do with their submodules."""

import ast
import inspect
import tokenize
from collections.abc import Iterator
from functools import cache

_LIBRARIES = ("torch.", "transformers.modeling_", "transformers.generation.", "transformers.integrations.")
"""Where classes are defined that know no linear of a model by its name."""


def is_library(kind: type) -> bool:
    """Whether a class is defined where no class knows a submodule of a model by its name."""
    return kind is object or f"{kind.__module__}.".startswith(_LIBRARIES)


def source_of(kind: type) -> ast.AST:
    """The source of a class; nothing where there is none to read, as of a class made at run time."""
    try:
        classes = _classes_in(inspect.getsourcefile(kind) or "")
    except (OSError, TypeError, SyntaxError):
        classes = {}
    return classes.get(kind.__name__, ast.Module([], []))


def methods_of(kind: type) -> Iterator[tuple[type, list[ast.FunctionDef]]]:
    """The functions in the source of a class and of each of its bases, but for those of libraries.

    None are found in a class that was made at run time.
    """
    for base in kind.__mro__:
        if not is_library(base):
            yield base, [node for node in ast.walk(source_of(base)) if isinstance(node, ast.FunctionDef)]


@cache
def _classes_in(file: str) -> dict[str, ast.ClassDef]:
    """The classes that a file defines on its outermost level, by name.

    Raises:
        OSError: the file cannot be read.
        SyntaxError: the file is no Python.
    """
    with tokenize.open(file) as opened:
        tree = ast.parse(opened.read())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def names_of(node: ast.AST) -> list[str]:
    """The names along an expression such as self.mlp.gate or self.x_proj[2]; empty where it is another kind."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        before, name = names_of(node.value), node.attr
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        before, name = names_of(node.value), str(node.slice.value)
    else:
        return []
    return [*before, name] if before else []
