"""Versions of packages, as runs, checkpoints and results keep them."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

VERSION = "0.1.0"
"""The version of this package; pyproject.toml reads it from here."""

OWN = "sorsa_ds"


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Name -> version of the packages that are installed; this one's too where it is only on the path.

    A package that is not installed is left out.
    """
    found = {}
    for name in names:
        try:
            found[name] = VERSION if name == OWN else version(name)
        except PackageNotFoundError:
            continue
    return found
