"""The structure holds: rooms and nothing beside them, short functions, downward imports; the checks find a breach."""

import ast
import re
from pathlib import Path

import pytest

from tests import structure

ROOT = structure.ROOT
FOREIGN_PATHS = re.compile(r"(?<![\w.~])/(work|root|home|Users)/|\.\./shared/")
"""Absolute paths in someone's own folders, and a folder that a clone does not come with."""
READ = [
    *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.yml"), *ROOT.glob("*.yaml"), ROOT / "Makefile",
    *(file for name in ("sorsa_ds", "launch", "docs", "examples", "ds_configs") for file in (ROOT / name).rglob("*.*")),
]  # fmt: skip


def plant(folder: Path, place: str, text: str) -> Path:
    """A package with one more module; returns the package."""
    module = folder / "sorsa_ds" / place
    module.parent.mkdir(parents=True, exist_ok=True)
    module.write_text(text)
    return folder / "sorsa_ds"


def test_the_package_keeps_to_its_limits():
    found = structure.measure()
    assert found["root_modules"] == 0, "the root of sorsa_ds holds rooms only"
    assert structure.upward_imports() == []
    assert found["rooms"] == len(structure.order_of_rooms())
    assert [one for one in structure.functions() if one[0] > 60] == []
    assert [one for one in structure.lengths() if one[0] > 350] == []


def imports_of_rooms(package: Path) -> list[str]:
    """What the `__init__` of rooms imports, in words, but for the room `peft`: users import it as it is, and that must
    register SORSA with PEFT."""
    return [
        f"{structure.place_of(module, package)}:{line} imports {name}"
        for module in sorted(package.glob("*/__init__.py"))
        if structure.room_of(module, package) != "peft"
        for line, name in structure.imports_of(module)
    ]


def test_rooms_import_nothing_by_themselves(tmp_path):
    """Processes that grade answers start often, and must not wait for PyTorch."""
    assert imports_of_rooms(structure.PACKAGE) == []
    assert imports_of_rooms(plant(tmp_path, "data/__init__.py", "import torch\n")) == [
        "sorsa_ds/data/__init__.py:1 imports torch"
    ]


def test_nothing_imports_the_room_peft_at_its_own_start():
    """It takes seconds: whoever needs it imports it where it is needed."""
    found = [
        structure.place_of(module)
        for module in structure.modules()
        if structure.room_of(module) != "peft"
        for node in ast.parse(module.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sorsa_ds.peft")
    ]
    assert found == []


def test_modules_at_the_root_are_counted(tmp_path):
    package = plant(tmp_path, "loose.py", "def f():\n    return 1\n")
    plant(tmp_path, "__init__.py", "")
    assert structure.measure(package)["root_modules"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "from sorsa_ds.train.trainer import Trainer\n",
        "import sorsa_ds.study.compare\n",
        "from sorsa_ds import train\n",
        "import sorsa_ds\n",
        "from sorsa_ds import __version__\n",
        "def f():\n    from sorsa_ds.train import trainer\n",
    ],
)
def test_an_upward_import_is_found(tmp_path, text):
    package = plant(tmp_path, "runtime/files.py", text)
    [told] = structure.upward_imports(package)
    assert told.startswith("sorsa_ds/runtime/files.py:")


def test_a_downward_import_is_none(tmp_path):
    text = "from sorsa_ds.runtime import files\nfrom sorsa_ds.train import report\nimport torch\n"
    assert structure.upward_imports(plant(tmp_path, "train/trainer.py", text)) == []


@pytest.mark.parametrize(
    "text",
    [
        'def f(method):\n    if method == "lora":\n        return 1\n',
        'def f(method):\n    return method in ("sorsa", "pissa")\n',
        'def f(method):\n    match method:\n        case "full":\n            return 1\n',
    ],
)
def test_a_comparison_with_a_methods_name_is_found(tmp_path, text):
    assert len(structure.method_name_branches(plant(tmp_path, "train/loss.py", text))) == 1
    assert structure.method_name_branches(plant(tmp_path / "allowed", "methods/lora.py", text)) == []


def test_the_longest_function_and_module_are_measured(tmp_path):
    package = plant(tmp_path, "train/long.py", "def f():\n" + "    x = 1\n" * 70 + "\n" * 300)
    plant(tmp_path, "train/short.py", "async def g():\n    return 1\n")
    assert structure.functions(package)[0] == (71, "sorsa_ds/train/long.py:1 f")
    assert structure.lengths(package)[0] == (371, "sorsa_ds/train/long.py")


def test_no_test_imports_another_test(tmp_path):
    assert structure.imports_of_tests() == []
    (tmp_path / "test_a.py").write_text("from tests.engine.test_engine import build\n")
    (tmp_path / "test_b.py").write_text("import tests.helpers.worlds\nfrom tests.run import test_resume\n")
    assert len(structure.imports_of_tests(tmp_path)) == 2


def test_nothing_names_a_folder_that_a_clone_lacks():
    found = []
    for file in READ:
        if file.suffix in (".py", ".md", ".sh", ".sbatch", ".toml", ".json", ".yaml", ".yml", ".svg", ""):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                found += [f"{file.relative_to(ROOT)}:{number} {line.strip()}"] if FOREIGN_PATHS.search(line) else []
    assert found == []


@pytest.mark.parametrize("text", ["cd /work/main", "`/home/me/x`", "--data ../shared/data/gsm8k", "=/root/.cache"])
def test_such_a_folder_is_found(text):
    assert FOREIGN_PATHS.search(text)


@pytest.mark.parametrize("text", ["docs/work/page", "~/home/", "/scratch/you/runs", "a ../shared_by_all"])
def test_other_folders_are_not(text):
    assert not FOREIGN_PATHS.search(text)
