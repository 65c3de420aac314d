"""The runs that the runs on clusters must equal: of one launcher with two ranks."""

import shutil
from pathlib import Path

import pytest

from sorsa_ds.runtime.cache import cache_folder
from tests.helpers.projects import default_settings, launch


@pytest.fixture(scope="session")
def references(untrained, tmp_path_factory) -> Path:
    """The small project in which these runs are made."""
    return Path(shutil.copytree(untrained, tmp_path_factory.mktemp("references") / "project"))


@pytest.fixture(scope="session")
def reference(references) -> Path:
    """The small job."""
    return launch(references, "one-launcher", "output.save_every=3")[1]


@pytest.fixture(scope="session")
def default_reference(references, embedded_model) -> Path:
    """The default job; the cache has the model, and now its decomposition."""
    return launch(references, "one-launcher-default", job=default_settings, SORSA_CACHE=str(cache_folder()))[1]
