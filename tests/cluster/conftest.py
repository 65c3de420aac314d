"""The run that the runs on clusters must equal."""

from pathlib import Path

import pytest
from projects import launch

from sorsa_ds.embedded import cache_folder


@pytest.fixture(scope="session")
def reference(project) -> Path:
    """One launcher with two ranks."""
    return launch(project, "one-launcher", "output.save_every=3")[1]
