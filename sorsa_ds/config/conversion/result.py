"""What a conversion has found so far: settings, what is not carried over, and what forbids it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sorsa_ds.config.conversion.foreign import Kind
from sorsa_ds.runtime.words import cut


@dataclass(slots=True, kw_only=True)
class Conversion:
    """A file of another trainer on its way to settings of this one.

    keys: key of the file -> its value.
    gpus: the number of the run's GPUs; None where the caller does not know it.
    steps: the number of the run's optimizer steps; None where the caller does not know it.
    method: the method that the caller wants; None: SORSA, or the one that the file names if that is none of LoRA.
    settings: dotted path -> (value, the key that it comes from).
    left: key -> why it is not carried over.
    refused: key -> why the file cannot be converted with it.
    notes: key -> what is not quite the same here.
    unset: keys that say nothing.
    agreed: keys that say what another one has said.
    defaulted: keys that the file leaves out, and whose defaults there are taken.
    """

    file: Path
    kind: Kind
    keys: Mapping[str, Any]
    gpus: int | None = None
    steps: int | None = None
    method: str | None = None
    settings: dict[str, tuple[Any, str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    unset: list[str] = field(default_factory=list)
    agreed: list[str] = field(default_factory=list)
    defaulted: list[str] = field(default_factory=list)

    def set(self, path: str, value: Any, key: str, note: str | None = None) -> None:
        """Carry a setting over, unless another key has said something else about it: that is refused."""
        if path in self.settings:
            before, other = self.settings[path]
            if before == value:
                self.agreed.append(key)
            else:
                self.refuse(key, f"{path} is {value!r} by it, and {before!r} by {other}")
            return
        self.settings[path] = value, key
        if note is not None:
            self.notes[key] = note

    def leave(self, key: str, why: str) -> None:
        """Say that a key is not carried over."""
        self.left[key] = why

    def refuse(self, key: str, why: str) -> None:
        """Say that a file cannot be converted with this key, because something else would be learned."""
        self.refused[key] = cut(why, 400)

    def value(self, path: str) -> Any:
        """What a setting is so far; None where nothing has said it."""
        return self.settings.get(path, (None, ""))[0]

    def of_whole(self, key: str, number: float) -> float | None:
        """A number of steps as a share of all steps; None, and refused, where their number is not known."""
        total = self.steps or self.value("train.steps")
        if not total:
            self.refuse(key, f"{number:g} steps are a share of a number that the file does not say: give --steps N")
            return None
        if number >= total:
            self.refuse(key, f"{number:g} steps are all of the run's {total}")
            return None
        return number / total


Rule = Callable[[Conversion, str, Any], None]
"""Carries a key with its value over, leaves it out or refuses it."""


def is_off(value: Any) -> bool:
    """Whether a value says that something is not wanted, or says nothing."""
    return value in (None, False, 0, "", [], {}) or str(value).lower() in ("none", "no", "false", "off")


def is_on(value: Any) -> bool:
    """Whether a value switches something on."""
    return value is True or str(value).lower() in ("true", "auto", "yes", "on", "1")


def names_of(value: Any) -> list[str]:
    """Names in a list, or in a text with commas between them."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]
