"""What a key of another trainer's file stands for here."""

from sorsa_ds.config import other_names
from sorsa_ds.config.fields import leaves
from sorsa_ds.config.schema import RunConfig


def meaning(key: str) -> other_names.Here | None:
    """What stands here for a key: by the tables of names, else by a setting's own name; None for an unknown one."""
    return other_names.here(key) or _by_own_name(key)


def path_of(key: str) -> str:
    """The setting that a key stands for; empty where it stands for none."""
    found = meaning(key)
    return found.path if found is not None else ""


def _by_own_name(key: str) -> other_names.Here | None:
    """The setting whose own name, without its section, is the same; None where none or several are."""
    named = [path for path in leaves(RunConfig) if path.rpartition(".")[2] == key]
    return other_names.Here(named[0]) if len(named) == 1 else None
