"""Dotted names in backticks, in docstrings of `sorsa_ds`, name something that exists.

Modules are read as syntax trees; only the names of settings come from an imported module.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sorsa_ds.config.fields import leaves
from sorsa_ds.config.schema import RunConfig
from tests import structure

NAME = re.compile(r"(?<![`\w])`([A-Za-z_]\w*(?:\.\w+)+)(?:\(\))?`(?!`)")
FOREIGN = {"deepspeed", "torch", "transformers", "peft", "numpy", "bitsandbytes", "safetensors", "json", "dataclasses"}
"""Packages whose names are not looked up."""
ELSEWHERE = {"self_attn.q_proj"}
"""Names that are not of code: a linear of a model."""


def dotted_names(module: Path) -> Iterator[tuple[int, str]]:
    """(line of the docstring, name) of every dotted name in backticks that a module's docstrings have."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from ((node.lineno, name) for name in NAME.findall(node.value.value))


def unknown_names(package: Path = structure.PACKAGE) -> list[str]:
    """Names that nothing has, in words."""
    settings = set(leaves(RunConfig))
    return [
        f"{structure.place_of(module, package)}:{line} {name}"
        for module in structure.modules(package)
        for line, name in dotted_names(module)
        if name not in settings | ELSEWHERE and not _exists(name.split("."), module, package)
    ]


def _exists(parts: list[str], module: Path, package: Path) -> bool:
    """Whether a name exists, seen from the root, from a folder above the module, or from inside the module."""
    if parts[0] in FOREIGN:
        return True
    folders = [package.parent, package, *(f for f in module.parents if package in f.parents)]
    if parts[-1] in ("py", "yaml"):
        return any((folder / ".".join(parts)).is_file() for folder in folders) or parts[-1] == "yaml"
    if any(_in_folder(parts, folder) for folder in folders):
        return True
    if any(_place(folder, parts[:2]) for folder in folders):  # it names a module, and that lacks the rest
        return False
    return _in_module(parts, module, package) or parts[0] in _variables(module)


def _place(folder: Path, parts: list[str]) -> Path | None:
    """The module or the room of this name in a folder."""
    place = folder.joinpath(*parts)
    if (file := place.with_suffix(".py")).is_file():
        return file
    return place if len(list(place.glob("*.py"))) else None


def _in_folder(parts: list[str], folder: Path) -> bool:
    """Whether a folder holds the module that the first parts name, and that defines what the others name."""
    for end in range(1, len(parts) + 1):
        place = _place(folder, parts[:end])
        if place is not None and place.is_dir() and (place / "__init__.py").is_file():
            place = place / "__init__.py"
        if place is not None and place.is_file() and _defines(_tree(place).body, parts[end:]):
            return True
    return False


def _in_module(parts: list[str], module: Path, package: Path) -> bool:
    """Whether a module defines the name, or imports what the first part names from where the rest is found."""
    body = _tree(module).body
    if _defines(body, parts):
        return True
    for _, name in structure.imports_of(module):
        where = name.split(".")
        if where[-1] == parts[0] and _in_folder([*where, *parts[1:]], package.parent):
            return True
    return False


def _defines(body: list[ast.stmt], parts: list[str]) -> bool:
    """Whether statements define a name, and its class the rest of the name; a value's own attributes are not known."""
    if not parts:
        return True
    body = [line for node in body for line in ([*node.body, *node.orelse] if isinstance(node, ast.If) else [node])]
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == parts[0]:
            inner = [*node.body, *(line for one in node.body if isinstance(one, ast.FunctionDef) for line in one.body)]
            return _defines(inner, parts[1:])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == parts[0]:
            return len(parts) == 1
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name | ast.Attribute) and ast.unparse(t) in (parts[0], f"self.{parts[0]}")
               for one in targets for t in (one.elts if isinstance(one, ast.Tuple) else [one])):  # fmt: skip
            return len(parts) == 1
    return False


def _variables(module: Path) -> set[str]:
    """Names of arguments and variables of a module's functions."""
    nodes = list(ast.walk(_tree(module)))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.arg for node in nodes if isinstance(node, ast.arg)}


@functools.cache
def _tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def test_dotted_names_in_docstrings_exist():
    assert unknown_names() == []


@pytest.mark.parametrize(
    "name", ["model.targets.select", "objective.summed_loss", "export.command.Options", "train.rate", "Method.optimise"]
)
def test_a_stale_name_is_found(tmp_path, name):
    package = _package(tmp_path, name)
    assert unknown_names(package) == [f"sorsa_ds/train/loss.py:1 {name}"]


@pytest.mark.parametrize(
    "name",
    ["model.targets.find", "sorsa_ds.model.targets.Target.rank", "Method.apply", "train.seed", "torch.nn.Linear",
     "loss.summed", "loss.py", "batch.size"],
)  # fmt: skip
def test_a_name_that_exists_is_none(tmp_path, name):
    assert unknown_names(_package(tmp_path, name)) == []


def _package(folder: Path, name: str) -> Path:
    """A package of a few modules, one of which names something in its docstring."""
    texts = {
        "train/loss.py": f'"""Like `{name}`."""\nfrom sorsa_ds.model.targets import Method\n\n\n'
        "def summed(batch):\n    ...\n",
        "model/targets.py": "def find(model):\n    ...\n\n\nclass Target:\n    rank: int\n\n\nclass Method:\n"
        "    def apply(self):\n        ...\n",
        "export/options.py": "class Options:\n    ...\n",
        "export/command.py": "from sorsa_ds.export.options import Options\n",
    }
    for place, text in texts.items():
        module = folder / "sorsa_ds" / place
        module.parent.mkdir(parents=True, exist_ok=True)
        (module.parent / "__init__.py").touch()
        module.write_text(text)
    return folder / "sorsa_ds"
