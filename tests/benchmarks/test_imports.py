"""Every program of benchmarks/ finds the names that it uses and tells its options, though it is seldom run."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "benchmarks" / "benchmarks.py"  # does its work when a script beside it imports it
MODULES = sorted(set((ROOT / "benchmarks").rglob("*.py")) - {STAND_IN})


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_it_can_be_imported(file):
    importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize(
    "name", sorted(f.stem for f in (ROOT / "benchmarks").glob("*.py") if "def main(" in f.read_text())
)
def test_it_tells_its_options(name, monkeypatch, capsys):
    program = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 0
    assert "--help" in capsys.readouterr().out
