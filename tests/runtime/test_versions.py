"""Versions of packages, as runs keep them."""

import subprocess
import sys

from sorsa_ds.runtime.versions import package_versions


def test_packages_that_are_not_installed_are_left_out():
    found = package_versions(["torch", "no-such-package"])
    assert list(found) == ["torch"]


def test_this_package_needs_no_metadata():
    """It may only be on the path, as on a cluster where nothing can be installed."""
    program = """
import importlib.metadata
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = missing
import sorsa_ds
from sorsa_ds.runtime.versions import package_versions
assert package_versions(["sorsa_ds", "torch"]) == {"sorsa_ds": sorsa_ds.__version__}
"""
    subprocess.run([sys.executable, "-c", program], check=True)
