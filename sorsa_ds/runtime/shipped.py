"""Where the files lie that come with the package: `ds_configs/` and `launch/`.

A wheel has them below `sorsa_ds/shipped/` (setup.py puts them there). In a checkout of the repository, and in an
editable installation of it, they are the repository's own.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
"""The folder in which `ds_configs/` and `launch/` lie."""
