"""Writes the comments of the shipped YAML files from the help texts of the settings.

    python -m sorsa_ds.config.recipes          # or `make recipe`, after a change of a setting's docstring

A recipe consists of a head comment that is written by hand, an empty line, and the keys that it sets. The help, type
and default of a key stand above it as a comment. `default.yaml` has no head, and sets every key.
"""

from itertools import takewhile
from pathlib import Path

from sorsa_ds.config.command_line import load_settings
from sorsa_ds.config.renamed import name_now
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.config.yaml_io import read_yaml, to_yaml
from sorsa_ds.runtime.files import write_text
from sorsa_ds.runtime.shipped import SHIPPED

FOLDER = SHIPPED / "launch" / "recipes"
DEFAULT = "default.yaml"


def rewritten(recipe: Path) -> str:
    """The text that a recipe should have: its own head and values, with comments from the settings' help texts.

    Raises:
        ValueError: the recipe sets an unknown key or a bad value. The message names file and line.
    """
    if recipe.name == DEFAULT:
        return to_yaml(RunConfig(), comments=True)
    given = {name_now(path) for path in read_yaml(recipe, RunConfig)}
    body = to_yaml(load_settings(RunConfig, recipe), comments=True, only=given)
    return f"{head(recipe)}\n{body.lstrip()}"


def head(recipe: Path) -> str:
    """The comment lines at the beginning of a recipe."""
    lines = recipe.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(takewhile(lambda line: line.startswith("#"), lines))


def main() -> None:
    """Rewrite all recipes."""
    for recipe in sorted(FOLDER.glob("*.yaml")):
        write_text(recipe, rewritten(recipe))


if __name__ == "__main__":
    main()
