"""The structure of `sorsa_ds/` in numbers, ending with one line of JSON:

    python -m tests.structure

root_modules: modules at the root beside `__init__`. rooms: folders at the root. upward_imports: imports of a room by a
lower one, in the order that pyproject.toml gives import-linter. method_name_branches: comparisons with a method's name,
and tables and lists of such names, outside of methods/ and config/. longest_function, longest_module: lines.
golden_equal: whether short training runs give the golden numbers to the last bit (`tests/golden/run.py`).
"""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sorsa_ds"
KNOW_METHODS = ("methods", "config")
"""Rooms that may look at a method's name."""


def modules() -> list[Path]:
    """Every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    """The folder at the root in which a module lies; empty for the root's own."""
    parts = module.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def order_of_rooms() -> list[str]:
    """The rooms from the highest to the lowest, as import-linter's contract has them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract] = (c for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    return contract["layers"]


def upward_imports() -> list[str]:
    """Imports of a higher room, in words."""
    order = order_of_rooms()
    height = {room: len(order) - place for place, room in enumerate(order)}
    found = []
    for module in modules():
        room = room_of(module)
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split(".")
                if room and parts[0] == "sorsa_ds" and len(parts) > 1 and height.get(parts[1], 0) > height[room]:
                    found.append(f"{module.relative_to(ROOT)}:{node.lineno} imports {name}")
    return found


def method_name_branches() -> list[str]:
    """Places that look at a method's name, in words: comparisons, beginnings of a text, tables and lists of names."""
    sys.path.insert(0, str(ROOT))
    from sorsa_ds.config.schema import MethodName

    names = set(get_args(MethodName))
    found = []
    for module in modules():
        if room_of(module) in KNOW_METHODS:
            continue
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if _looks_at_a_name(node, names):
                found.append(f"{module.relative_to(ROOT)}:{node.lineno}")
    return list(dict.fromkeys(found))


def _looks_at_a_name(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, ast.Dict | ast.Tuple | ast.List | ast.Set):  # one name may be a section's, or a format's
        listed = node.keys if isinstance(node, ast.Dict) else node.elts
        return sum(isinstance(one, ast.Constant) and one.value in names for one in listed) > 1
    compared: list[ast.expr] = []
    if isinstance(node, ast.Compare):
        compared = [node.left, *node.comparators]
    elif isinstance(node, ast.MatchValue):
        compared = [node.value]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        compared = node.args if node.func.attr in ("startswith", "endswith") else []
    return any(constant in names for one in compared for constant in _constants(one))


def _constants(node: ast.expr) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def functions() -> list[tuple[int, str]]:
    """(lines, place and name) of every function, the longest first."""
    found = [
        (node.end_lineno - node.lineno + 1, f"{module.relative_to(ROOT)}:{node.lineno} {node.name}")
        for module in modules()
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return sorted(found, reverse=True)


def lengths() -> list[tuple[int, str]]:
    """(lines, path) of every module, the longest first."""
    found = [(len(m.read_text(encoding="utf-8").splitlines()), str(m.relative_to(ROOT))) for m in modules()]
    return sorted(found, reverse=True)


def measure() -> dict:
    """Every number but `golden_equal`, which takes half a minute."""
    return {
        "root_modules": sum(1 for m in modules() if not room_of(m) and m.name != "__init__.py"),
        "rooms": len({room_of(m) for m in modules()} - {""}),
        "upward_imports": len(upward_imports()),
        "method_name_branches": len(method_name_branches()),
        "longest_function": functions()[0][0],
        "longest_module": lengths()[0][0],
    }


def main() -> None:
    """Print what stands out, then the line of JSON."""
    for told in (*upward_imports(), *method_name_branches()):
        print(told)
    for lines, name in (*functions()[:5], *lengths()[:5]):
        print(f"{lines:5} lines  {name}")
    golden = subprocess.run([sys.executable, str(ROOT / "tests" / "golden" / "run.py")], stdout=subprocess.DEVNULL)
    print(json.dumps({**measure(), "golden_equal": golden.returncode == 0}))


if __name__ == "__main__":
    main()
