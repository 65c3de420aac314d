"""The shipped YAML files: their comments are written by machine from the settings' own help.

    python -m sorsa_ds.config.recipes          # `make recipe`: after a change of sorsa_ds/config/schema.py

A recipe is a head comment, written by hand, an empty line, and the keys that it sets; a key's help, type and default
stand above it. `default.yaml` has no head and every key.
"""

import re
from pathlib import Path

from sorsa_ds.config.command_line import REPOSITORY, load
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.config.yaml_io import read_yaml, to_yaml
from sorsa_ds.runtime.files import write_text

FOLDER = REPOSITORY / "launch" / "recipes"
DEFAULT = "default.yaml"


def rewritten(recipe: Path) -> str:
    """What a recipe's file should hold: its own head and values, everything else from the settings as they are.

    Raises:
        ValueError: it sets what is no setting, or a bad value; with file and line.
    """
    if recipe.name == DEFAULT:
        return to_yaml(RunConfig(), comments=True)
    body = to_yaml(load(RunConfig, recipe), comments=True, only=read_yaml(recipe, RunConfig))
    return f"{head(recipe)}\n{body.lstrip()}"


def head(recipe: Path) -> str:
    """The comment that a recipe begins with, up to the first line that is none."""
    return re.match(r"(?:#.*\n)*", recipe.read_text(encoding="utf-8")).group()


def main() -> None:
    """Write all recipes anew."""
    for recipe in sorted(FOLDER.glob("*.yaml")):
        write_text(recipe, rewritten(recipe))


if __name__ == "__main__":
    main()
