"""How a setting is declared: as a field of a dataclass made with `settings`, with its help text as a docstring."""

from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:  # a type checker understands a dataclass only by the decorator of the standard library
    from dataclasses import dataclass as settings
else:
    settings = dataclass(
        kw_only=True, slots=True, frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True)
    )
    """Decorator of a class of settings: immutable, its types checked, the docstring under a field kept as its help."""

LONGEST_PATH, LONGEST_PART = 4095, 255
"""Bytes of a path, and of a file's or folder's own name, on Linux."""
MOST = 10**9
"""The largest number that a setting may have where it has no narrower range: nothing that can be run needs more."""

PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
PositiveFloat = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A measured number, which has no largest value."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
MOST_EXAMPLES = 10**6
"""The largest number of examples in one optimizer step, each of which every rank takes in hand to plan the step."""
BatchSize = Annotated[int, Field(ge=1, le=MOST_EXAMPLES)]
"""A number of examples, or of forward passes, in one optimizer step."""
Rank = Annotated[int, Field(ge=1, le=2**16)]
"""A number of singular triplets; no linear of a known model has as many columns and rows."""
Rounds = Annotated[int, Field(ge=1, le=1000)]
"""A number of decompositions, or of passes over a weight, each of which takes as long as the first."""
MOST_SEED = 2**32 - 1
"""The largest seed that NumPy and PyTorch both take."""
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""A digest as `sorsa_ds.runtime.digest` writes it."""


def check_count(option: str, value: int, least: int = 1, most: int = MOST) -> None:
    """Check the whole number that a command's option has.

    Raises:
        ValueError: the number lies outside of `least` to `most`.
    """
    if not least <= value <= most:
        raise ValueError(f"{option}: {value} is no integer from {least} to {most:,}")


def check_text(text: str) -> str:
    """The text, if it can be the name of a file and be written to one.

    Raises:
        ValueError: the text holds a NUL character, or something that is no character in UTF-8.
    """
    if "\0" in text:
        raise ValueError("it holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds something that is no character") from error
    return text


def check_name(text: str) -> str:
    """The text, if a file system can look for a file of that name.

    Raises:
        ValueError: the text, or one of its parts between slashes, is longer than any file system takes.
    """
    if len(text.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_PART for part in text.split("/")):
        raise ValueError(f"it is longer than a path ({LONGEST_PATH:,} bytes) or a part of one ({LONGEST_PART}) can be")
    return text


Text = Annotated[str, AfterValidator(check_text)]
"""Text that can be written to a file."""
Token = Annotated[str, AfterValidator(check_text), Field(min_length=1)]
"""Text of one token, which is not empty."""
Name = Annotated[str, AfterValidator(check_text), AfterValidator(check_name), Field(min_length=1)]
"""Text that may name a file or folder; an empty one would stand for the current folder."""
