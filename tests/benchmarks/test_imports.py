"""Every program of benchmarks/ finds the names of the package that it uses, though it is seldom run."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "benchmarks" / "benchmarks.py"  # does its work when a script beside it imports it
MODULES = sorted(set((ROOT / "benchmarks").rglob("*.py")) - {STAND_IN})


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_it_can_be_imported(file):
    importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
