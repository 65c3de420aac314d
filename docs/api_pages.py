"""A hook of mkdocs: pages of the API from the docstrings, one for each room, and of all messages."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sorsa_ds"


def rooms() -> list[str]:
    """The rooms from the highest to the lowest, as import-linter's contract in pyproject.toml has them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = next(c for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers")["layers"]
    return [room for room in layers if (PACKAGE / room).is_dir()]


def page(room: str) -> str:
    """The page of a room in Markdown: what the room is for, then every module in it."""
    lines = [f"# sorsa_ds.{room}", ""]
    purpose = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    if purpose:
        lines += [purpose.splitlines()[0], ""]
    for path in sorted((PACKAGE / room).rglob("*.py")):
        if path.name != "__init__.py":
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            lines += [f"## {module.removeprefix(f'sorsa_ds.{room}.')}", "", f"::: {module}", ""]
    return "\n".join(lines)


def messages() -> str:
    """The page of all messages for what a user can mend, as they stand in the sources; what a run fills in is `…`."""
    lines = [
        "# Every message",
        "",
        "What the program says of mistakes that can be mended, room by room. `…` stands for names and numbers of the",
        "case. Each message names what is wrong, where, and how to mend it; [Troubleshooting](../troubleshooting.md)",
        "says more of those that are met most.",
    ]  # fmt: skip
    for room in rooms():
        found = {text for path in sorted((PACKAGE / room).rglob("*.py")) for text in _raised(path)}
        if found:
            lines += ["", f"## {room}", "", *(f"- `` {text} ``" for text in sorted(found))]
    return "\n".join(lines)


def _raised(path: Path) -> Iterator[str]:
    """The texts of the ValueErrors that a module raises, but those which only pass on another's words."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = _template(node.exc.args[0]).replace("\n", " ")
            if ast.unparse(node.exc.func) == "ValueError" and re.search(r"[a-z]{3}", text):
                yield text


def _template(node: ast.expr) -> str:
    """A text of the sources with `…` where values are filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    return "…"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages behind the others in the navigation."""
    pages = [{f"sorsa_ds.{room}": f"api/{room}.md"} for room in rooms()]
    config.nav.append({"API": [{"Every message": "api/messages.md"}, *pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, which lie nowhere on the disk."""
    files.append(File.generated(config, "api/messages.md", content=messages()))
    for room in rooms():
        files.append(File.generated(config, f"api/{room}.md", content=page(room)))
    return files
