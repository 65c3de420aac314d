"""The folder that keeps what is made once from one run to the next, such as converted models and decompositions."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """The folder that the environment variable SORSA_CACHE names, or else the user's cache folder."""
    return Path(os.environ.get("SORSA_CACHE") or platformdirs.user_cache_dir("sorsa_ds"))
