"""Finished runs to export, and what tests of 4-bit layers need around them."""

from pathlib import Path

import pytest

from tests.helpers.architectures import save
from tests.helpers.finished import finished_run
from tests.helpers.packed_layers import packed_layers_of_any_size

__all__ = ["packed_layers_of_any_size"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each architecture, by name; made when it is asked for."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(name: str, **settings) -> Path:
        key = "-".join([name, *(f"{k}={v}" for k, v in settings.items())]).replace("/", "")
        if key not in made:
            base = root / "models" / name
            if not base.exists():
                save(name, base)
            made[key] = finished_run(base, root / f"run-{len(made)}", **settings)
        return made[key]

    return run
