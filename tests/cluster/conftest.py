"""The runs that the runs on clusters must equal: of one launcher with two ranks."""

from pathlib import Path

import pytest

from sorsa_ds.runtime.cache import cache_folder
from tests.helpers.projects import default_settings, launch


@pytest.fixture(scope="session")
def reference(untrained) -> Path:
    """The small job."""
    return launch(untrained, "one-launcher", "output.save_every=3")[1]


@pytest.fixture(scope="session")
def default_reference(untrained, embedded_model) -> Path:
    """The default job; the cache has the model, and now its decomposition."""
    return launch(untrained, "one-launcher-default", job=default_settings, SORSA_CACHE=str(cache_folder()))[1]
