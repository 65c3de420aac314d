"""The runs that the runs on clusters must equal: of one launcher with two ranks."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.projects import launch


@pytest.fixture(scope="session")
def references(untrained, tmp_path_factory) -> Path:
    """The small project in which these runs are made."""
    return Path(shutil.copytree(untrained, tmp_path_factory.mktemp("references") / "project"))


@pytest.fixture(scope="session")
def reference(references) -> Path:
    """The small job."""
    return launch(references, "one-launcher", "output.save_every=3")[1]
