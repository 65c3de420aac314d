"""What is written for readers can be read: entries of docstrings stand alone, and pages name files that are there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import structure

ROOT = structure.ROOT
CODE = sorted(
    file for name in ("sorsa_ds", "launch", "benchmarks", "examples", "tests") for file in (ROOT / name).rglob("*.py")
)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])

LEANING = re.compile(
    r"(?:^ +|[.;] )(?!None:|[Uu]nset:|empty:)(?:\w+(?:, \w+)*: "
    r"(?:of|these|those|that|as|(?:in|on|from|to|by|with|for|after|over) which|whose)\b"
    r"|(?:\w*Error|Nonsense): (?:as|it|they|there are none)\b)",
    re.MULTILINE,
)
"""The beginning of an entry that says nothing without its name: `seed: of the drawing`, `ValueError: it is not`."""

PLACE = re.compile(r"`((?:sorsa_ds|launch|ds_configs|tests|benchmarks|docs|examples|\.ci)/[\w./-]*)(?:::\w+)?[`\s]")
"""A file or folder of this repository, in backticks, alone or as the beginning of a command."""


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that stands alone in a file, as docstrings do."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def leaning_entries(text: str) -> list[str]:
    """The entries of a docstring that cannot be read without their names."""
    return [found.group().strip() for found in LEANING.finditer(text)]


def missing_places(text: str) -> list[str]:
    """Files and folders of this repository that a page names and that are not there; NAME stands for any name."""
    return [place for place in PLACE.findall(text) if "NAME" not in place and not (ROOT / place).exists()]


def test_entries_of_docstrings_stand_alone():
    found = [
        f"{file.relative_to(ROOT)}:{line}: {entry}"
        for file in CODE
        for line, text in docstrings(file)
        for entry in leaning_entries(text)
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "Args:\n        seed: of the drawing, from 0.",
        "Args:\n        rows, columns: those that are read.",
        "Raises:\n        ValueError: as `choose`.",
        "Raises:\n        ValueError: it is not.",
        "Raises:\n        Nonsense: it is not JSON.",
        "    rows: those\n    of all steps.",
        "    a: the one. b: of the other.",
    ],
)
def test_an_entry_that_leans_on_its_name_is_found(text):
    assert len(leaning_entries(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Args:\n        seed: the seed of the drawing.",
        "Raises:\n        ValueError: the item is missing.",
        "note: of it",
    ],
)
def test_other_entries_are_not(text):
    assert leaning_entries(text) == []


def test_pages_name_files_that_are_there():
    found = {page.relative_to(ROOT): missing_places(page.read_text(encoding="utf-8")) for page in PAGES}
    assert {page: places for page, places in found.items() if places} == {}


def test_a_file_that_is_not_there_is_found():
    text = "`tests/gone.py::test_it`, `docs/gone/`, `launch/gone.py --x`, `tests/conftest.py` and `docs/`"
    assert missing_places(text) == ["tests/gone.py", "docs/gone/", "launch/gone.py"]
