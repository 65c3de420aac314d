"""The folder in which this user's converted models and decompositions are kept."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Where converted models are kept: SORSA_CACHE, or the user's cache folder."""
    return Path(os.environ.get("SORSA_CACHE") or platformdirs.user_cache_dir("sorsa_ds"))
