"""The lock file pins, with hashes, everything that pyproject.toml asks for; PyTorch alone is pinned elsewhere."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from sorsa_ds.model.embedded import REQUIREMENT
from sorsa_ds.runtime import extras
from tests.helpers.projects import ROOT


def locked() -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each package that the lock names."""
    lines = re.sub(r"\\\n", " ", (ROOT / "requirements.lock").read_text())
    found = {}
    for line in lines.splitlines():
        if line and not line.startswith("#"):
            name, version = re.match(r"([A-Za-z0-9_.-]+)==(\S+)", line).groups()
            found[canonicalize_name(name)] = version, len(re.findall(r"--hash=sha256:[0-9a-f]{64}", line))
    return found


def required() -> list[Requirement]:
    """What `make install` has to install: the requirements of the package, its extras, its tests and its site."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    [everything] = map(Requirement, optional["all"])
    lines = [*project["dependencies"]]
    for name in (*sorted(everything.extras), "dev", "docs"):
        lines += optional[name]
    return [Requirement(line) for line in lines]


def test_every_locked_package_has_hashes():
    assert len(locked()) > 100
    assert [name for name, (_, hashes) in locked().items() if not hashes] == []


@pytest.mark.parametrize("requirement", required(), ids=lambda requirement: requirement.name)
def test_the_lock_has_a_version_that_pyproject_allows(requirement):
    if requirement.name == "torch":
        [version] = re.findall(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert "torch" not in locked()
    else:
        version, _ = locked()[canonicalize_name(requirement.name)]
    assert Version(version) in requirement.specifier


def test_the_lock_has_the_embedded_model():
    [line] = [line for line in (ROOT / "requirements-model.txt").read_text().splitlines() if not line.startswith("#")]
    assert line == REQUIREMENT, "what the message tells the user to install"
    name, version = line.split("==")
    assert locked()[canonicalize_name(name)][0] == version


def test_every_package_of_an_extra_is_one_that_a_message_names():
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [everything] = map(Requirement, optional["all"])
    told = {(package, extra) for package, extra in extras.EXTRAS.values()}
    assert told == {(Requirement(line).name, extra) for extra in everything.extras for line in optional[extra]}
