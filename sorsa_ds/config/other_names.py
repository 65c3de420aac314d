"""What settings are called elsewhere, for people who bring the names of another trainer: `other_names.yaml`."""

import functools
from dataclasses import dataclass
from pathlib import Path

import yaml

TABLES = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True, slots=True)
class Here:
    """What stands here for another trainer's setting.

    path: the setting, or the command's option; empty where there is none. value: what it is set to where the other
    trainer's setting is on; None where its value is carried over.
    why: the reason why there is none. alters: whether leaving it out changes what is learned.
    """

    path: str = ""
    value: str | None = None
    why: str = ""
    alters: bool = False


def here(name: str) -> Here | None:
    """What stands here for another trainer's setting; None for a name that is not known.

    Args:
        name: without a section; case and hyphens do not matter.
    """
    return _tables().get(name.lower().replace("-", "_"))


def hint(name: str) -> str | None:
    """What stands here for another trainer's setting, in words; None for a name that is not known."""
    found = here(name)
    if found is None:
        return None
    if not found.path:
        return f"there is none: {found.why}"
    return f"here it is {found.path}" + ("" if found.value is None else f"={found.value}")


@functools.cache
def _tables() -> dict[str, Here]:
    tables = yaml.safe_load(TABLES.read_text(encoding="utf-8"))
    altering = {*tables["alters"].split()}
    found: dict[str, Here] = {}
    for target, names in tables["same"].items():
        path, equals, value = target.partition("=")
        found |= dict.fromkeys(names.split(), Here(path, value if equals else None))
    for why, names in tables["absent"].items():
        found |= {name: Here(why=why, alters=name in altering) for name in names.split()}
    return found
