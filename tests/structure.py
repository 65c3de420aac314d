"""The structure of `sorsa_ds/` in numbers, ending with one line of JSON:

    python -m tests.structure

root_modules: modules at the root beside `__init__`. rooms: folders at the root. upward_imports: imports of a room by a
lower one, in the order that pyproject.toml gives import-linter. method_name_branches: comparisons with a method's name,
tables and lists of such names, one method taken by its name, and questions for a method's class, outside of methods/
and config/. longest_function, longest_module: lines.
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
TESTS = ROOT / "tests"
KNOW_METHODS = ("methods", "config")
"""Rooms that may look at a method's name."""
AMBIGUOUS = ("sorsa", "lora")
"""Methods' names that are also a section of the settings, or a format of an export."""


def modules(package: Path = PACKAGE) -> list[Path]:
    """Every module of the package."""
    return sorted(package.rglob("*.py"))


def room_of(module: Path, package: Path = PACKAGE) -> str:
    """The folder at the root in which a module lies; empty for the root's own."""
    parts = module.relative_to(package).parts
    return parts[0] if len(parts) > 1 else ""


def place_of(module: Path, package: Path = PACKAGE) -> str:
    """Where a module lies, from the folder that holds the package."""
    return str(module.relative_to(package.parent))


def imports_of(module: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def order_of_rooms() -> list[str]:
    """The rooms from the highest to the lowest, as import-linter's contract has them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract] = (c for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    return contract["layers"]


def upward_imports(package: Path = PACKAGE) -> list[str]:
    """Imports of a higher room, in words."""
    order = order_of_rooms()
    height = {room: len(order) - place for place, room in enumerate(order)}
    found = []
    for module in modules(package):
        room = room_of(module, package)
        for line, name in imports_of(module):
            parts = name.split(".")
            if not room or parts[0] != "sorsa_ds":
                continue
            root = len(parts) == 1 or parts[1] not in height  # the root imports from every room
            if root or height[parts[1]] > height[room]:
                found.append(f"{place_of(module, package)}:{line} imports {name}")
    return found


def method_name_branches(package: Path = PACKAGE) -> list[str]:
    """Places that look at which method it is, in words: comparisons, tables and lists of names, look-ups, classes."""
    sys.path.insert(0, str(ROOT))
    from sorsa_ds.config.schema import MethodName

    names = set(get_args(MethodName))
    classes = method_classes()
    found = []
    for module in modules(package):
        if room_of(module, package) in KNOW_METHODS:
            continue
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if _looks_at_a_name(node, names) or _looks_at_a_class(node, classes):
                found.append(f"{place_of(module, package)}:{node.lineno}")
    return list(dict.fromkeys(found))


def _looks_at_a_name(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, ast.Dict | ast.Tuple | ast.List | ast.Set):  # one name may be a section's, or a format's
        listed = node.keys if isinstance(node, ast.Dict) else node.elts
        named = [one.value for one in listed if isinstance(one, ast.Constant) and one.value in names]
        return len(named) > 1 or (isinstance(node, ast.Dict) and any(name not in AMBIGUOUS for name in named))
    compared: list[ast.expr] = []
    if isinstance(node, ast.Subscript) and _last_name(node.value) == "METHODS":
        compared = [node.slice]
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):  # a table that is asked on the spot
        compared = [key for key in node.value.keys if key]
    if isinstance(node, ast.Compare):
        compared = [node.left, *node.comparators]
    elif isinstance(node, ast.MatchValue):
        compared = [node.value]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        looked_up = node.func.attr == "get" and _last_name(node.func.value) == "METHODS"
        compared = node.args if looked_up or node.func.attr in ("startswith", "endswith") else []
        if node.func.attr == "get" and isinstance(node.func.value, ast.Dict):
            compared = [key for key in node.func.value.keys if key]
    return any(constant in names for one in compared for constant in _constants(one))


def method_classes(package: Path = PACKAGE) -> set[str]:
    """The names of the classes of methods: `Method` and everything that inherits from it in methods/."""
    bases = {
        node.name: {_last_name(base) for base in node.bases}
        for module in modules(package / "methods")
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    found = {"Method"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def _looks_at_a_class(node: ast.AST, classes: set[str]) -> bool:
    """Whether the node is isinstance or issubclass with a method's class, or compares with one."""
    if isinstance(node, ast.Call) and _last_name(node.func) in ("isinstance", "issubclass"):
        return any(_last_name(part) in classes for argument in node.args[1:] for part in ast.walk(argument))
    if isinstance(node, ast.Compare):
        return any(_last_name(one) in classes for one in (node.left, *node.comparators))
    return isinstance(node, ast.MatchClass) and _last_name(node.cls) in classes


def _last_name(node: ast.AST) -> str:
    """The name that the node is, without what stands before its last dot; empty where it is none."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _constants(node: ast.expr) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def functions(package: Path = PACKAGE) -> list[tuple[int, str]]:
    """(lines, place and name) of every function, the longest first."""
    found = [
        (node.end_lineno - node.lineno + 1, f"{place_of(module, package)}:{node.lineno} {node.name}")
        for module in modules(package)
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return sorted(found, reverse=True)


def lengths(package: Path = PACKAGE) -> list[tuple[int, str]]:
    """(lines, path) of every module, the longest first."""
    found = ((len(m.read_text(encoding="utf-8").splitlines()), place_of(m, package)) for m in modules(package))
    return sorted(found, reverse=True)


def imports_of_tests(folder: Path = TESTS) -> list[str]:
    """Imports of a test by a test or a helper, in words; what tests share stands in tests/helpers."""
    return [
        f"{place_of(module, folder)}:{line} imports {name}"
        for module in modules(folder)
        for line, name in imports_of(module)
        if any(part.startswith("test_") for part in name.split("."))
    ]


def measure(package: Path = PACKAGE) -> dict[str, int]:
    """Every number but `golden_equal`, which takes half a minute."""
    return {
        "root_modules": sum(1 for m in modules(package) if not room_of(m, package) and m.name != "__init__.py"),
        "rooms": len({room_of(m, package) for m in modules(package)} - {""}),
        "upward_imports": len(upward_imports(package)),
        "method_name_branches": len(method_name_branches(package)),
        "longest_function": functions(package)[0][0],
        "longest_module": lengths(package)[0][0],
    }


def golden_equal() -> bool:
    """Whether short training runs give the golden numbers; what they print is shown where they do not."""
    program = [sys.executable, str(ROOT / "tests" / "golden" / "run.py")]
    done = subprocess.run(program, text=True, capture_output=True, check=False)
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
    return done.returncode == 0


def main() -> None:
    """Print what stands out, then the line of JSON."""
    for told in (*upward_imports(), *method_name_branches()):
        print(told)
    for lines, name in (*functions()[:5], *lengths()[:5]):
        print(f"{lines:5} lines  {name}")
    print(json.dumps({**measure(), "golden_equal": golden_equal()}))


if __name__ == "__main__":
    main()
