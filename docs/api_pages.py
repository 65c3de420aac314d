"""A hook of mkdocs: pages of the API from the docstrings, one for each room of `sorsa_ds`; nothing is imported."""

import ast
import tomllib
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


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages behind the others in the navigation."""
    config.nav.append({"API": [{f"sorsa_ds.{room}": f"api/{room}.md"} for room in rooms()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, which lie nowhere on the disk."""
    for room in rooms():
        files.append(File.generated(config, f"api/{room}.md", content=page(room)))
    return files
