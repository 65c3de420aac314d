"""Names that settings had in earlier versions: read from old files and command lines, and told with their new names."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sorsa_ds.config.yaml_io import Given

_SHARED = ("targets", "exclude", "train_whole", "rank", "experts", "expert_rank", "rank_pattern", "alpha", "dropout")
RENAMED = {f"sorsa.{name}": f"adapter.{name}" for name in _SHARED}
"""Name of a setting in an earlier version -> its name now."""


def name_now(path: str) -> str:
    """The name that a setting has now."""
    return RENAMED.get(path, path)


def with_new_names(given: Sequence[tuple[str, Given]]) -> list[tuple[str, Given]]:
    """Settings of one file, or of one command line in its order, each under the name that it has now.

    Raises:
        ValueError: one stands there under both of its names, with two values. The message names both places.
    """
    said = dict(given)
    for path, item in given:
        new = name_now(path)
        if path != new and new in said and said[new].value != item.value:
            raise ValueError(
                f"{path} is the earlier name of {new}, and they say two things: {item.value!r} ({item.where}) and "
                f"{said[new].value!r} ({said[new].where}); leave {path} out"
            )
    return [(name_now(path), item) for path, item in given]


def renamed_note(given: Iterable[tuple[str, Given]]) -> str | None:
    """A sentence on settings that stand somewhere under earlier names; None where there are none."""
    told = [f"{path} is called {RENAMED[path]} now ({item.where})" for path, item in given if path in RENAMED]
    return f"{'; '.join(told)}. Earlier names are still read." if told else None


def renamed_sections(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier version saved of its settings, by sections, with each setting under the name that it has now.

    Args:
        saved: nested dictionaries. What else is in them stays as it is.

    Raises:
        ValueError: a setting stands there under both of its names, with two values.
    """
    found = {name: dict(part) if isinstance(part, dict) else part for name, part in saved.items()}
    for old, new in RENAMED.items():
        (before, name), (after, _) = old.split("."), new.split(".")
        if not isinstance(found.get(before), dict) or name not in found[before]:
            continue
        section = found.setdefault(after, {})
        if not isinstance(section, dict):
            continue  # no section: the reader refuses it
        value = found[before].pop(name)
        if section.setdefault(name, value) != value:
            raise ValueError(f"{old} is the earlier name of {new}, and they are {value!r} and {section[name]!r}")
    return found
