"""What settings are called elsewhere, for people who bring the names of another trainer: `other_names.yaml`."""

import functools
from pathlib import Path

import yaml

TABLES = Path(__file__).with_suffix(".yaml")


def hint(name: str) -> str | None:
    """What stands here for another trainer's setting, in words; None for a name that is not known.

    Args:
        name: without a section; case and hyphens do not matter.
    """
    same, absent = _tables()
    name = name.lower().replace("-", "_")
    if name in same:
        return f"here it is {same[name]}"
    return f"there is none: {absent[name]}" if name in absent else None


@functools.cache
def _tables() -> tuple[dict[str, str], dict[str, str]]:
    """By another trainer's name: the setting here, and why there is none."""
    tables = yaml.safe_load(TABLES.read_text(encoding="utf-8"))
    same, absent = ({name: here for here, names in tables[key].items() for name in names.split()} for key in tables)
    return same, absent
